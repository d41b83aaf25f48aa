"""The capability ``build``: bring a store up to date in one command."""
