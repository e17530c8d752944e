"""The grafted model: a vision tower, a projector, a frozen base and its workflows."""
