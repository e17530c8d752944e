"""LLaVA: the projector alone, base frozen or trained: the baseline (arXiv 2304.08485)."""
