"""The architecture, and nothing about data: backbones, connectors, the model, checkpoints."""
