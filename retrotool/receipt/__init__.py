"""Checking purges and erases, and writing receipts."""
