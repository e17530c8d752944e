"""What a training will need of memory, found on the meta device: no weights are read."""
