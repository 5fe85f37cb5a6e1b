"""Initial weights, adapters, and the formats of other libraries."""
