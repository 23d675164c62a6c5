"""The trainer: data, loop, checkpoints, metrics."""
