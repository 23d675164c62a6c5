"""Several ranks, measured: ``moba-cp bench cluster``."""
