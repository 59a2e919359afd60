"""Benchmarks of the inference relay: ``make bench``. README.md says what is measured and how to read it."""
