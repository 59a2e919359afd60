"""Model types: what runs a model."""
