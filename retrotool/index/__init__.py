"""Vectors to an index, and searching it."""
