"""Relay of the KV events that vLLM and SGLang publish over ZMQ themselves."""
