"""What scripts/check_cluster.py does: which machines are up, how fast they and their links are, and a forecast."""
