"""Attention by layer (LAWS), summed without holding a map."""
