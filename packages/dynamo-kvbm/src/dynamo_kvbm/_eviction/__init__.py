"""Eviction orders, one a file. All of them evict leaves only."""
