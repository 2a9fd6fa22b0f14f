"""Autoscaler for LLM serving: forecast, capacity, decision."""
