"""The block manager behind vLLM, as a KV connector of vLLM's V1 interface."""
