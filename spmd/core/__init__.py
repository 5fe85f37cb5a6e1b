"""What everything uses: configuration fields, checks, trees, digests, storage; no room is below it."""
