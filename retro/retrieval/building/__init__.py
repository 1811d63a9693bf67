"""Stores made and changed: build, add, remove, compact, verify, and the neighbors of every chunk."""
