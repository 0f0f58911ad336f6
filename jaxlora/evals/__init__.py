"""GSM8K evaluation: prompts, answer extraction, strict and numeric scores."""
