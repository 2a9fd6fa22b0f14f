"""Anthropic's messages API over the same pipeline as chat completions."""
