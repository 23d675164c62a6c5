"""Where a number was measured: every table, file and chart says it."""

import subprocess
from pathlib import Path

import torch
import triton

import moba_cp
from moba_cp.kernels import serving


def environment(device: torch.device) -> dict[str, str]:
    """GPU, versions and the commit of the checkout, if the package runs from one."""
    return {
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "torch": torch.__version__,
        "cuda": str(torch.version.cuda),
        "cudnn": str(torch.backends.cudnn.version()),
        "triton": triton.__version__,
        "kernels": serving(device),
        "moba_cp": moba_cp.__version__,
        "commit": _commit(),
    }


def described(where: dict[str, str], *names: str) -> str:
    """Some of :func:`environment` as a line for a chart's title."""
    titles = {"torch": "PyTorch ", "triton": "Triton ", "nccl": "NCCL ", "commit": "commit "}
    return ", ".join(titles.get(name, "") + where[name] for name in ("gpu", *names, "commit"))


def _commit() -> str:
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        # A fixed command.
        return subprocess.run(
            command, cwd=Path(moba_cp.__file__).parent, capture_output=True, text=True, check=True, timeout=10
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"
