"""Streams that outlive their connection: numbered events, kept for a while and replayed to a client that comes back."""
