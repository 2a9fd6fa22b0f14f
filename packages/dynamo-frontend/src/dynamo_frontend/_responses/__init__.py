"""OpenAI's responses API over the same pipeline as chat completions; nothing is stored."""
