"""One host tier over the ranks of a tensor-parallel engine: one leader decides, every rank moves its shards."""
