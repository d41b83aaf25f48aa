"""Neighbours as files for other tools."""
