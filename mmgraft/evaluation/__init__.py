"""Evaluation: numbers for what a graft can do, and for what it leaves as it was."""
