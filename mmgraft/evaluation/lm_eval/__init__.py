"""Tasks of lm-evaluation-harness on a grafted model."""
