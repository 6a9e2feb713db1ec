"""Checks that need a GPU and an engine of another environment; each is run by hand, and skips nothing silently."""
