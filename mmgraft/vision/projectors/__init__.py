"""Projectors: from a tower's features to the base's embedding width."""
