"""Loss, optimizer, schedule, training step and loop."""
