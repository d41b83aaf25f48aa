"""A store and its neighbours as training sequences."""
