"""Jobs on real engines, each in an environment of its own."""
