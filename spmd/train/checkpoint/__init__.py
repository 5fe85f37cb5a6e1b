"""Checkpoints: steps of a run directory, writing, reading."""
