"""The room that judges: benchmarks, their scorers and controls, the runner, and the report."""
