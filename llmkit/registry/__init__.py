"""The one owner of configurations and models."""
