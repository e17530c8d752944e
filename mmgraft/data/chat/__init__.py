"""A conversation as text, ids and labels: the chat template, the processor, what is supervised."""
