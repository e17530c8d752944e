"""What watches a stage while it trains: progress, metrics, losses, stopping."""
