"""Who may come in, and how much each may ask for: API keys and rate limits."""
