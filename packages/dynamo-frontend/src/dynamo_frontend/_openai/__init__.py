"""OpenAI's wire forms: requests with their limits, responses, stream chunks."""
