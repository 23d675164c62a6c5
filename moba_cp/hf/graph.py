"""Tokens one by one without the host: forward passes of one token, as one CUDA graph that is replayed.

A model's pass of one token launches some hundred small kernels, and the GPU waits for the host between them.
"""

import functools
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers.modeling_outputs import CausalLMOutputWithPast

from ..steps import Step
from .cache import MoBACache
from .options import read_options


@contextmanager
def decoding_graph(model, cache: MoBACache) -> Iterator[None]:
    """Within it ``model(token, past_key_values=cache)`` and ``model.generate(..., past_key_values=cache)`` replay a
    CUDA graph for each pass of one token; other passes are as ever. On a CPU, passes of one token compute the same,
    without a graph.

    Sequences have no padding. Where the cache has no room for a token, its pass is as ever, and the next one makes a
    graph again: give the cache the capacity that is needed. Where a pass cannot be captured a warning says why, and all
    are as ever.

    Args:
        model: a causal language model as :func:`moba_cp.hf.use_moba` leaves it.
        cache: its cache.
    """
    decoder = _Decoder(model, cache)
    had = model.__dict__.get("forward")

    # Generation looks at the signature, which wraps() leaves to be found.
    @functools.wraps(decoder.plain)
    def forward(*args, **kwargs):
        return decoder.forward(*args, **kwargs)

    model.forward = forward
    try:
        yield
    finally:
        if had is None:
            del model.forward
        else:
            model.forward = had
        decoder.close()


_KNOWN = {
    "attention_mask", "cache_position", "logits_to_keep", "past_key_values", "position_ids", "return_dict", "use_cache",
}  # fmt: skip
"""Arguments of a pass that a graph's step does justice to."""


class _Decoder:
    """The passes of one token."""

    def __init__(self, model, cache: MoBACache):
        self.plain = model.forward
        self._cache, self._tokens = cache, [layer.tokens for layer in cache.layers]
        config = model.config.get_text_config()
        options = read_options(getattr(config, "moba", None), config.num_hidden_layers)
        # By keys themselves blocks are chosen on tables that the host makes.
        self._able = all(layer.decoding == "full" or layer.moba.gate.score == "mean" for layer in options)
        self._step: Step | None = None
        self._ids: Tensor | None = None
        self._positions: Tensor | None = None
        self._graph: torch.cuda.CUDAGraph | None = None
        self._logits: Tensor | None = None
        self._storage: list[tuple[int, torch.Size]] = []
        self._stepped = -1
        """Tokens of each sequence after the last step, if no other pass came after it."""

    def forward(self, input_ids: Tensor | None = None, **kwargs):
        """In the place of the model's own."""
        logits = None
        if self._serves(input_ids, kwargs):
            logits = self._next(input_ids, kwargs.get("attention_mask"), kwargs.get("position_ids"))
        if logits is None:
            self._stepped = -1
            return self.plain(input_ids=input_ids, **kwargs)
        return CausalLMOutputWithPast(logits=logits, past_key_values=self._cache)

    def close(self) -> None:
        """Passes are the model's own again."""
        self._graph = self._logits = None
        for layer in self._cache.layers:
            if layer.tokens.length:
                layer.look()

    def _serves(self, input_ids: Tensor | None, kwargs: dict) -> bool:
        if not self._able or input_ids is None or input_ids.dim() != 2 or input_ids.shape[1] != 1:
            return False
        if kwargs.get("past_key_values") is not self._cache or torch.is_grad_enabled():
            return False
        # What a graph knows nothing of is the model's own affair.
        if any(value not in (None, False) for name, value in kwargs.items() if name not in _KNOWN):
            return False
        if not kwargs.get("use_cache", True) or not kwargs.get("return_dict", True):
            return False
        self._tokens = [layer.tokens for layer in self._cache.layers]
        length = self._tokens[0].length
        # A pass over a single key is a prompt's.
        return length > 1 and all(length < tokens.storage[0].shape[1] for tokens in self._tokens)

    def _next(self, input_ids: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None) -> Tensor | None:
        """The logits [b, 1, vocabulary] of a token; None if it cannot be captured."""
        length, device = self._tokens[0].length, input_ids.device
        held = [x for tokens in self._tokens for x in tokens.storage]
        held += [layer.recent.storage for layer in self._cache.layers if layer.recent is not None]
        storage = [(x.data_ptr(), x.shape) for x in held]
        # Behind another pass the sequences may be others, with padding; reading a mask makes the host wait.
        if self._stepped != length and attention_mask is not None and not attention_mask.all():
            return None
        if self._step is None or storage != self._storage or self._ids.shape != input_ids.shape:
            with torch.inference_mode(False):
                self._step, self._ids = Step(device), input_ids.clone()
                self._positions = torch.empty_like(self._ids)
            self._graph, self._storage = None, storage
            for tokens in self._tokens:
                tokens.average()
        self._ids.copy_(input_ids)
        self._step.position.fill_(length)
        if position_ids is None:
            self._positions.fill_(length)
        else:
            self._positions.copy_(position_ids)
        if device.type != "cuda":
            logits = self._run()
        else:
            if self._graph is None and not self._captured():
                return None
            self._graph.replay()
            logits = self._logits.clone()
        for tokens in self._tokens:
            tokens.advance(id(tokens) in self._step.averaged)
        self._stepped = length + 1
        return logits

    def _run(self) -> Tensor:
        step = self._step
        step.begin()
        for tokens in self._tokens:
            tokens.step = step
        try:
            how = dict(position_ids=self._positions, past_key_values=self._cache, use_cache=True, return_dict=True)
            return self.plain(input_ids=self._ids, **how).logits
        finally:
            for tokens in self._tokens:
                tokens.step = None

    def _captured(self) -> bool:
        """Make the graph. A step writes where the next one writes again, so that it may run more than once."""
        current, side = torch.cuda.current_stream(), torch.cuda.Stream()
        side.wait_stream(current)
        try:
            with torch.cuda.stream(side):
                for _ in range(2):
                    self._run()
            current.wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self._logits = self._run()
        except RuntimeError as error:
            self._able = False
            why = str(error).strip().splitlines() or [type(error).__name__]
            warnings.warn(f"tokens come one by one without a CUDA graph: {why[0]}", stacklevel=2)
            return False
        self._graph = graph
        return True
