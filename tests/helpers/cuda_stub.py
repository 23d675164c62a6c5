"""Megatron's DDP, schedules and optimizers on the CPU: they ask for CUDA by name, and get the CPU.

For tests alone. ``with cuda_on_cpu():`` sends every tensor made on or moved to "cuda" to the CPU, and gives
``torch.cuda``'s streams, events and random state stand-ins.
"""

import contextlib
from unittest import mock

import torch
from megatron.core.tensor_parallel import random as megatron_random
from megatron.core.transformer.moe import token_dispatcher
from torch.overrides import TorchFunctionMode

_TYPES = {"torch.FloatTensor": "torch.cuda.FloatTensor", "torch.BFloat16Tensor": "torch.cuda.BFloat16Tensor"}


class _OnCPU(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        name = getattr(function, "__name__", "")
        if name in ("cuda", "pin_memory") and isinstance(args[0], torch.Tensor):
            return args[0]
        if name == "type" and len(args) == 1 and not kwargs:
            plain = function(*args)
            return _TYPES.get(plain, plain)
        if "device" in kwargs and "cuda" in str(kwargs["device"]):
            kwargs["device"] = "cpu"
        kwargs.pop("pin_memory", None)
        args = tuple("cpu" if isinstance(x, (str, torch.device)) and "cuda" in str(x) else x for x in args)
        return function(*args, **kwargs)


def _to_host(x, as_numpy=False, record_stream=False):
    """What Megatron makes of a CUDA tensor there; a tensor of the CPU it leaves as it is."""
    return x.numpy() if as_numpy and isinstance(x, torch.Tensor) else x


class _Nothing:
    """A stream or an event that has nothing to wait for."""

    def __init__(self, *_, **__):
        pass

    def __getattr__(self, name):
        return lambda *_, **__: None

    def record_event(self, *_):
        return self

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


@contextlib.contextmanager
def cuda_on_cpu():
    """See the module."""

    def nothing(*_, **__):
        return None

    stubs = {
        "current_device": lambda: "cpu",
        "set_device": nothing,
        "synchronize": nothing,
        "empty_cache": nothing,
        "manual_seed": torch.manual_seed,
        "get_rng_state": lambda *_, **__: torch.get_rng_state(),
        "Stream": _Nothing,
        "Event": _Nothing,
        "stream": _Nothing,
        "current_stream": _Nothing,
        "default_stream": _Nothing,
    }
    with contextlib.ExitStack() as stack:
        for name, stub in stubs.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, stub))
        for name, stub in (("range_push", nothing), ("range_pop", nothing)):
            stack.enter_context(mock.patch.object(torch.cuda.nvtx, name, stub))
        for name, stub in (
            ("_get_cuda_rng_state", lambda *_, **__: torch.get_rng_state()),
            ("_set_cuda_rng_state", lambda state, *_, **__: torch.set_rng_state(state)),
        ):
            stack.enter_context(mock.patch.object(megatron_random, name, stub))
        stack.enter_context(mock.patch.object(token_dispatcher, "maybe_move_tensor_to_cpu", _to_host))
        # Compiling would find one stand-in under several of torch's names, and fail.
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(_OnCPU())
        yield
