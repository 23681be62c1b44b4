"""Checkpoints of other projects, read and written, each conversion proven."""
