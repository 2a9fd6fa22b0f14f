"""The profiler: sweeps an engine over prompt length and concurrency, and writes the profile that a planner reads."""
