"""The rerank API: documents ordered by the likeness of their vectors to the query's."""
