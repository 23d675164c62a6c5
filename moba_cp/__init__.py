"""Context-parallel MoBA attention for training on very long sequences."""
