"""Starts run.py elsewhere or several times: local processes, Slurm, TPU VMs, GKE. Standard library only."""
