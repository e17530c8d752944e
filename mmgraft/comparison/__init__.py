"""Several grafts of one base, trained alike and measured alike."""
