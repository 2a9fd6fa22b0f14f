"""The TensorRT-LLM adapter."""
