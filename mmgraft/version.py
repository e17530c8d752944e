"""The version of mmgraft, which every package may import."""

__version__ = "0.1.0"
