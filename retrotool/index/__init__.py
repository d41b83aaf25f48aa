"""Build indexes of vectors, and search them."""
