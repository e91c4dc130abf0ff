"""Adapters whose deltas depend on the base model's weights, made plain ones beside them before anything else sees them."""
