"""Engine host, engine adapters and a small real reference engine."""
