"""Callbacks that watch a stage while it trains: progress, metrics, losses, stopping."""
