"""Mesh, shardings, scope and collectives: how arrays are sharded over devices, and exchanged."""
