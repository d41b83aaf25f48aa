"""Tables with the nearest chunks of every chunk."""
