"""What a graft can do, and what it leaves as it was, in numbers."""
