"""The local vLLM engine."""
