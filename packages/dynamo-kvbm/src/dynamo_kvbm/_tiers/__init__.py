"""Storage of blocks, one tier a file."""
