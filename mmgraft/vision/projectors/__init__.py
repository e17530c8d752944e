"""Projectors: from a tower's features to vectors of the base's embedding width, one file each."""
