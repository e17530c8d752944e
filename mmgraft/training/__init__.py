"""Staged training from a recipe, through transformers' Trainer."""
