"""Purging, undoing and erasing."""
