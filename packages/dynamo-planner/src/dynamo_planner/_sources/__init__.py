"""Where observations come from, one source a file."""
