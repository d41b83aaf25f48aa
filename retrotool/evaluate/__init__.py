"""Evaluate language models on a store, with and without retrieval from a database."""
