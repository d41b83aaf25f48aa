"""Describe a store, show its log, and verify it."""
