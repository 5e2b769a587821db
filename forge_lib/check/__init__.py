"""Checks a cluster before a run: which machines are up, how fast they and their links are, and a forecast."""
