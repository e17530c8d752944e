"""The loopback Hub, for towers by id."""

from hub_fixtures import hub

__all__ = ["hub"]
