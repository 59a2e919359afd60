"""The way of a request: admission, relay, record."""
