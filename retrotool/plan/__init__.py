"""Estimate what a database of a given size takes."""
