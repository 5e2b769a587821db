"""The p2p-llm-forge command: it starts scripts/train.py on one machine or on all, and restarts it."""
