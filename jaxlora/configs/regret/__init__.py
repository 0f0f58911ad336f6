"""Experiments of `jaxlora.regret`: adapters against full fine-tuning, each at its own best learning rate."""
