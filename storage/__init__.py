"""Braid's store: bytes in, digests out. No arithmetic on tensors, no HTTP status codes."""
