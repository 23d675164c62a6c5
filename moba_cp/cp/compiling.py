"""What torch.compile is to leave alone."""

import inspect

import torch

# PyTorch 2.7 and later print it where a graph ends, and in the error of fullgraph=True.
_WHY = (
    {"reason": "moba_cp: collectives, and plans made from values, run outside of graphs"}
    if "reason" in inspect.signature(torch.compiler.disable).parameters
    else {}
)


def outside_graphs(function):
    """``function`` as one break of the graph for torch.compile, which looks at nothing within."""
    return torch.compiler.disable(function, **_WHY)
