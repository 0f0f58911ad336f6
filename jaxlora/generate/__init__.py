"""Decoding: weights in the form that it wants, a KV cache with slots, greedy answers."""
