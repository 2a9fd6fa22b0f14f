"""The gates and benchmarks of the workspace."""
