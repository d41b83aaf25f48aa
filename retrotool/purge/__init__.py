"""Purging, undoing and erasing, and the proof of it."""
