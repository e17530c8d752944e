"""Generate answers to sets in batches and keep each one as it comes."""
