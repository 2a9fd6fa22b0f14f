"""KV block manager: pools and tiers for device, host, disk and object store."""
