"""Checkpoints that the published IAA and Wings code wrote, read as grafts."""

#: Whose checkpoints are read, in a help text.
PUBLISHED = "IAA or Wings"
