"""Log-probabilities of texts: multiple choice and perplexity."""
