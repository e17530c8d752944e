"""Grafts behind OpenAI's API, served by the application of transformers' own server."""
