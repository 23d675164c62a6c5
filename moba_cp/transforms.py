"""What PyTorch may ask of an operator besides its value and its gradient: autocast, forward mode, second derivatives.

Autocast is followed at the library's border, where inputs are cast; inside it is off. The others are refused: a custom
Function whose backward pass is plain code would otherwise be differentiated as if its saved tensors were constants.
"""

import functools
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch.autograd import forward_ad


def cast_inputs(*tensors: Tensor) -> list[Tensor]:
    """``tensors`` as PyTorch's own attention takes them under autocast: in autocast's dtype, except float64."""
    cast = []
    for x in tensors:
        device = x.device.type
        if x.is_floating_point() and x.dtype != torch.float64 and _autocast_is_on(device):
            x = x.to(torch.get_autocast_dtype(device))
        cast.append(x)
    return cast


def without_autocast(function):
    """Decorator: ``function`` computes in the dtypes that it is given, whatever autocast says when it is called.

    A backward pass runs under the autocast of whoever calls ``backward``, not under that of its forward pass.
    """

    @functools.wraps(function)
    def call(*args):
        with autocast_off(next(x.device for x in args if isinstance(x, Tensor))):
            return function(*args)

    return call


def autocast_off(device: torch.device) -> AbstractContextManager:
    """What is computed within it on ``device`` has the dtypes that it is given."""
    return torch.autocast(device.type, enabled=False) if _autocast_is_on(device.type) else nullcontext()


def once_differentiable(backward):
    """Decorator of a Function's ``backward``: to differentiate its results is an error.

    PyTorch's decorator of this name does not connect the results to the Function's inputs: asked for a gradient with
    respect to one of them, autograd finds that it is not used.
    """

    @functools.wraps(backward)
    def call(ctx, *grads):
        with torch.no_grad():
            results = backward(ctx, *grads)
        if not torch.is_grad_enabled():
            return results
        at = [i for i, x in enumerate(results) if x is not None]
        refused = _Refused.apply(len(at), *(results[i] for i in at), *grads, *ctx.saved_tensors)
        results = list(results)
        for i, x in zip(at, refused, strict=True):
            results[i] = x
        return tuple(results)

    return call


class _Refused(torch.autograd.Function):
    @staticmethod
    def forward(ctx, n_results: int, *tensors):
        return tuple(x.view_as(x) for x in tensors[:n_results])

    @staticmethod
    def backward(ctx, *_grads):
        refuse_second_derivatives()


def refuse_second_derivatives(*_args) -> None:
    """Raise RuntimeError."""
    raise RuntimeError("second derivatives of moba_cp's functions are not implemented: a gradient was differentiated")


def check_no_tangent(**tensors: Tensor) -> None:
    """Raise ValueError for an input of forward-mode differentiation, through which no tangent would come."""
    if torch.compiler.is_compiling():
        return
    for name, x in tensors.items():
        if forward_ad.unpack_dual(x).tangent is not None:
            raise ValueError(
                f"{name} has a tangent, but forward-mode differentiation (jvp) is not implemented; use reverse mode"
            )


def _autocast_is_on(device: str) -> bool:
    # Asked of a device that has no autocast it raises; whether a device has it, Dynamo cannot ask in PyTorch 2.11.
    return device != "meta" and torch.is_autocast_enabled(device)
