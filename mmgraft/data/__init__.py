"""Rows, what they are read from, and what a model gets of them."""
