"""Reading and writing weights: Hugging Face checkpoints, PEFT adapters, run state."""
