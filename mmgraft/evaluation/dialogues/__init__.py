"""Interleaved image and text dialogues (IIT, Wings section 4)."""
