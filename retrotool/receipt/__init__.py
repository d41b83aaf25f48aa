"""Checking that a purge holds and that an erase left nothing, and the receipt that says so."""
