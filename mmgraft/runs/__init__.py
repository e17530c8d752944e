"""A run's folder: find it, its results, the files that belong to the graft. Free of torch."""
