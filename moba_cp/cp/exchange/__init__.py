"""Only what was selected moves: its blocks come here, or query rows go to where the blocks are."""
