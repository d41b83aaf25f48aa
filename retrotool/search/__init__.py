"""Chunks near a text, on the shell."""
