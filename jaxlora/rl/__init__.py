"""Policy-gradient reinforcement learning: problems, rewards, and what is done with them."""
