"""Memory that a training will need, found on the meta device: no weights are read."""
