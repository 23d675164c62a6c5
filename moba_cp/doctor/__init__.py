"""Is this machine, and are these machines together, fit for training: ``moba-cp doctor``."""
