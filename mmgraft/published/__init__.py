"""Checkpoints that the published IAA and Wings code wrote, read as grafts."""
