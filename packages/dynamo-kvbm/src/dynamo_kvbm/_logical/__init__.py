"""Blocks without bytes: which exist, what state they are in, who holds them, and which goes next."""
