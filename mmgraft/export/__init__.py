"""Write a graft for use elsewhere: alone, with base and tower, or as a stock LLaVA model."""
