"""The loopback Hub, and a graft to spoil."""

from hub_fixtures import hub
from refusals import here, parts, refused, run

__all__ = ["here", "hub", "parts", "refused", "run"]
