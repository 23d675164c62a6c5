"""The curves of the MoBA paper as commands."""
