"""A small, real, continuous-batching engine in NumPy for Llama-architecture models.

Read it in this order: ``_sequence`` (what a running request is), ``_block_pool`` (paged KV cache with prefix caching),
``_scheduler`` (who computes in a step), ``_model`` (the forward pass), ``_sampler`` (the next token), ``_core`` (one
step, put together, single-threaded), ``engine`` (the thread around it and the engine contract).
"""
