"""The Experiment, its budget, its overrides, and the registry of experiment files."""
