"""A graft as files of llama.cpp: a text GGUF, and what it sees with as an mmproj."""
