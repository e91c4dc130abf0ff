"""Thin endpoints: parse, delegate, answer."""
