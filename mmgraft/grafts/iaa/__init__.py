"""IAA: decoder layers inserted after chosen base layers, each a trained copy (arXiv 2408.12902)."""
