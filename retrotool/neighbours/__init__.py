"""The nearest chunks of every chunk, as tables."""
