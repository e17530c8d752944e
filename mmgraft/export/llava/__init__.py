"""A graft as a stock LLaVA model, which transformers loads without mmgraft."""
