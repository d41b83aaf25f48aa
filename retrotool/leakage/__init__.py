"""Measure how much of an evaluation store's text a database contains."""
