"""Training on several processes: which ways can work, and how a model is sharded."""
