"""Models in Flax NNX: configuration, parameter table, modules and attention backends."""
