"""How much of an evaluation store a database holds."""
