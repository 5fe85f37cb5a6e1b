"""Launchers of run.py: local processes, Slurm, TPU VMs, GKE. Standard library only."""
