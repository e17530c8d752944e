"""Rows as batches: data set, collator, sequence packing, sampling order."""
