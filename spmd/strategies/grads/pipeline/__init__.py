"""Layers over devices: schedules as tables (schedules), and the loop that runs any of them (execute)."""
