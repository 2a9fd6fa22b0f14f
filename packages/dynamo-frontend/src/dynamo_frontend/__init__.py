"""OpenAI-compatible HTTP frontend for LLM serving."""
