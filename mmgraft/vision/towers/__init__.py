"""Frozen image encoders: any vision model of transformers, and registered kinds."""
