"""Embed chunks as vectors."""
