"""Parts of a graft to spoil, and `refused`; see refusals.py."""

from refusals import here, parts, refused, run

__all__ = ["here", "parts", "refused", "run"]
