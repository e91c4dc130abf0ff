"""Braid's service: HTTP in, recipes through, jobs out. It introduces `merge_algos` and `storage` to each other."""
