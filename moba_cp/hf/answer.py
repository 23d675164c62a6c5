"""Prompts of any length, answered: the prompt in pieces, then token by token."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor
from transformers import GenerationConfig
from transformers.generation.streamers import BaseStreamer

from .cache import MoBACache
from .graph import decoding_graph


class _Stream(BaseStreamer):
    """Hands on each token but the prompt's."""

    def __init__(self, on_token: Callable[[int], None]):
        self._on_token, self._is_prompt = on_token, True

    def put(self, value: Tensor) -> None:
        """What ``generate`` has: the prompt, then tokens."""
        if not self._is_prompt:
            for token in value.flatten().tolist():
                self._on_token(token)
        self._is_prompt = False

    def end(self) -> None:
        """Nothing is left."""


@contextmanager
def _without_settings(model) -> Iterator[None]:
    """transformers takes what a call leaves open from the model's own settings, such as a penalty for repetitions."""
    kept, model.generation_config = model.generation_config, GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = kept


def answer(
    model,
    prompt: Tensor,
    max_tokens: int = 256,
    piece: int = 16_384,
    temperature: float = 0.0,
    top_p: float = 1.0,
    end: int | list[int] | None = None,
    on_token: Callable[[int], None] | None = None,
    cuda_graph: bool | None = None,
) -> Tensor:
    """The tokens that follow a prompt, by transformers' ``generate`` with a :class:`moba_cp.hf.MoBACache`.

    The model's own settings (``generation_config``) do not count.

    Args:
        model: as :func:`moba_cp.hf.use_moba` leaves it.
        prompt: [n] int64.
        max_tokens: of the answer.
        piece: tokens of the prompt that are computed at a time.
        temperature: 0 takes the likeliest token.
        top_p: tokens are drawn from the likeliest that together have this probability.
        end: a token, or some, with which an answer ends; None: it ends after ``max_tokens``.
        on_token: called with each token as it comes.
        cuda_graph: see :func:`moba_cp.hf.decoding_graph`; None uses one on a GPU.

    Returns:
        [m] int64, the answer with the token that ended it.

    Raises:
        ValueError: an argument is out of range.
    """
    if prompt.dim() != 1 or prompt.numel() == 0:
        raise ValueError(f"prompt has shape {tuple(prompt.shape)}; pass the tokens of one prompt, at least one of them")
    for name, value in (("max_tokens", max_tokens), ("piece", piece)):
        if value < 1:
            raise ValueError(f"{name}={value} is not above 0; use 1 or more")
    if temperature < 0 or not 0 < top_p <= 1:
        raise ValueError(f"temperature={temperature}, top_p={top_p}: use 0 or more, and above 0 up to 1")
    n = prompt.numel()
    sampling = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    if temperature > 0:
        # Of top_k None means 50 to transformers 5, and 0 all tokens.
        sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
    first_end = end[0] if isinstance(end, list) else end
    how = GenerationConfig(
        max_new_tokens=max_tokens,
        prefill_chunk_size=piece if n > piece else None,
        eos_token_id=end,
        pad_token_id=0 if first_end is None else first_end,
        **sampling,
    )
    ids, cache = prompt.to(model.device)[None], MoBACache(model, n + max_tokens)
    if cuda_graph is None:
        cuda_graph = ids.is_cuda
    with _without_settings(model), decoding_graph(model, cache) if cuda_graph else nullcontext():
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            generation_config=how,
            past_key_values=cache,
            streamer=None if on_token is None else _Stream(on_token),
        )
    return out[0, n:]
