"""Weights in and out: Hugging Face checkpoints, PEFT adapters, run state."""
