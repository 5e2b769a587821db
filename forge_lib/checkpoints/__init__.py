"""Checkpoints: their format, how one is verified and found, and when they are written and deleted."""
