"""Chunks beside their neighbours, for people to read."""
