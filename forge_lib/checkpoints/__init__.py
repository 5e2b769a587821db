"""Checkpoints: writes, verifies, finds, loads and deletes them."""
