"""Metrics of answers: VQA, captions, boxes, yes/no, options; intervals."""
