"""Helpers that every room uses: configuration fields, checks, trees, digests, storage. The lowest room."""
