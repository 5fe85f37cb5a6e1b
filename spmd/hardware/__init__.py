"""Chips, links and targets; FLOPs; the reader of compiled programs (hlo)."""
