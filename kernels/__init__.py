"""Triton kernels, in the order in which one attention call runs them."""
