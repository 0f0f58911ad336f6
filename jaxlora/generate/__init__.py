"""Decoding: weights in a form suited to it, a KV cache with slots, greedy or sampled answers."""
