"""Processes and the devices they use."""
