"""A model that several processes hold in shards."""
