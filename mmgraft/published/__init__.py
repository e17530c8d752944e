"""Checkpoints that the published IAA and Wings code wrote, read as grafts."""

PUBLISHED = "IAA or Wings"
"""Whose checkpoints are read, in a help text."""
