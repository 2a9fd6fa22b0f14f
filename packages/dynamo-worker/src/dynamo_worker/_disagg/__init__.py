"""Disaggregated prefill and decode: the prompt is computed on one worker, the output on another."""
