"""Mesh, shardings, scope and collectives: how arrays lie on devices, and how they are exchanged."""
