"""Writes a graft for use elsewhere: alone, with its base and tower, or as a stock LLaVA model."""
