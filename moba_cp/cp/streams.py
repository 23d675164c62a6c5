"""A stream beside the one that computes, and waiting for what was issued there."""

import contextlib

import torch


def wait_for(event: torch.cuda.Event | None) -> None:
    """Let the current stream wait for ``event``; None has happened."""
    if event is not None:
        torch.cuda.current_stream().wait_event(event)


class SideStream:
    """A stream that goes before others; made at the first use."""

    def __init__(self):
        self._stream: torch.cuda.Stream | None = None

    def beside(self, after: torch.cuda.Event | None):
        """Context in which work is issued beside the current stream, once it has passed ``after``; nothing for None."""
        if after is None:
            return contextlib.nullcontext()
        if self._stream is None:
            self._stream = torch.cuda.Stream(priority=-1)
        self._stream.wait_event(after)
        return torch.cuda.stream(self._stream)
