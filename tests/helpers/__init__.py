"""What the tests share: small models, broken input, processes that are watched, killed or joined."""
