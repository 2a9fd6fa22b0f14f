"""KV-cache-aware request router that explains its decisions."""
