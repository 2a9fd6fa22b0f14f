"""Forecasters, one a file; ``series`` holds what they share."""
