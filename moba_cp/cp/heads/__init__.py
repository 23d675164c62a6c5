"""Tokens exchanged for heads: a rank attends with a share of the heads to what several ranks hold."""
