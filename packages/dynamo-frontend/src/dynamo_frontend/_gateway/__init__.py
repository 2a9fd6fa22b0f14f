"""Gateway before stock OpenAI-compatible engines: no runtime, no worker of ours, bytes passed through."""
