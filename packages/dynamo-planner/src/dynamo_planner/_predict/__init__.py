"""Forecasters, one a file."""
