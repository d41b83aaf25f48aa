"""What is in a store, its log, and whether it is whole."""
