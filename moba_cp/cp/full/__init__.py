"""Exact full attention across ranks: by a ring or an all-gather."""
