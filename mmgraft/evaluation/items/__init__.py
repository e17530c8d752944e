"""Items to evaluate on, and the sets they come in."""
