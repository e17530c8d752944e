"""Wings: low-rank learners beside the attention, weighed by a router (arXiv 2406.03496)."""
