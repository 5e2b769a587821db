"""Measures the program on this machine, beside what it is compared with: scripts/benchmark.py."""
