"""Rebuild damaged files of a store."""
