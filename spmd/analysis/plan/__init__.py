"""Know before you pay: what an experiment would need on a target, without its devices or its data."""
