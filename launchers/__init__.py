"""Scripts that start training: quickstart, torchrun, Slurm."""
