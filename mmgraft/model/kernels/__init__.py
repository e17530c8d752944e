"""Cheaper computations of the same numbers: recomputation, compilation, 4-bit, flat heads."""
