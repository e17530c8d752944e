"""Files that a user writes: recipes and sets to evaluate on. Free of torch."""
