"""Search for the chunks nearest to a text."""
