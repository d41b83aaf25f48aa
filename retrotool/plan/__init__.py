"""What a database of a given size will take."""
