"""Chunks beside their neighbours, to be looked at."""
