"""Functions of an experiment: plan, verify, compare."""
