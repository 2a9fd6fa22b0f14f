"""Trying eviction policies on recorded traffic."""
