"""The loopback Hub, and a graft to spoil."""

from hub_fixtures import hub
from refusals import here, parts, refused, run
from wires import called

__all__ = ["called", "here", "hub", "parts", "refused", "run"]
