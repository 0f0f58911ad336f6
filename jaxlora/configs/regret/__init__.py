"""Experiments of `jaxlora.regret`: adapters versus full fine-tuning, each at its own best learning rate."""
