"""The methods: one folder each, found through the registry."""
