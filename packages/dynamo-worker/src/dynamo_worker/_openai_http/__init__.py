"""A sidecar to any OpenAI-compatible server: the server stays stock, this is its engine."""
