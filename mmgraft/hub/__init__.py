"""The Hub: the model card, and the push."""
