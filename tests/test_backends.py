"""The two backends are twins: what one has the other has, with the same arguments."""

import inspect

import pytest

from moba_cp import eager, kernels

# How much memory the kernels' slices may take; plain PyTorch has its own bound.
KERNELS_ALONE = {"scratch_bytes"}


def test_same_functions():
    # Which kernels serve a GPU is a question to the kernels alone.
    assert set(eager.__all__) == set(kernels.__all__) - {"serving"}


@pytest.mark.parametrize("name", eager.__all__)
def test_same_arguments(name):
    ours, theirs = (inspect.signature(getattr(module, name)).parameters for module in (eager, kernels))
    theirs = {key: value for key, value in theirs.items() if key not in KERNELS_ALONE}
    assert list(ours) == list(theirs)
    for key, value in ours.items():
        assert (value.kind, value.default) == (theirs[key].kind, theirs[key].default), key
