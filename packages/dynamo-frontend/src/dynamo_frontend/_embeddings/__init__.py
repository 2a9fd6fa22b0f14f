"""The embeddings API: vectors from workers whose model type is ``embedding``."""
