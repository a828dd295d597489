"""A mechanism's state as a picture or a text table; widgets are a thin shell round that."""
