"""cluster.yaml, and the files that follow from it: accelerate YAMLs and the WireGuard network."""
