"""Read a store and its neighbours as training sequences."""
