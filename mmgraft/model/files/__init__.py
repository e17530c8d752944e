"""A graft's files: create, load and save them; summarise what they hold."""
