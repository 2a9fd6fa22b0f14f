"""The local supervisor: keeps worker processes on this machine, scales, drains and replaces them."""
