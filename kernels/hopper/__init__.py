"""Kernels for Hopper, and their launches.

They replace those of :mod:`..forward` and :mod:`..backward` where :func:`serves` and the table at the end of
:mod:`..tuned` say so, and that of :mod:`..select` where :func:`selects` does, and compute the same.

:mod:`.short_blocks` and :mod:`.long_blocks` are the forward, :mod:`.dkdv` and :mod:`.dq` are the gradients. A program
has three warpgroups. The producer loads K and V by TMA, and gathers rows of Q and dout, which lie anywhere, by
cp.async. The two consumers compute, each at its own pace, so that the softmax of one overlaps with the matrix products
of the other. Warpgroups synchronize by mbarriers in shared memory alone (see :mod:`.shared`). In :mod:`.select` a
program is one warp, and each thread has a row.

The kernels are written in Gluon, which comes with Triton and changes with it. They were measured on H100 and H200 with
the versions of :data:`MEASURED`. A newer version of Triton has to pass :mod:`..hopper_check` on a GPU before they
serve there.
"""

import logging
import re
import threading
from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from ..common import cdiv, launch_options
from ..tuned import Tile, is_hopper

# Versions of Triton, (major, minor).
MEASURED = ((3, 6), (3, 7))
HEAD_DIMS = (64, 128)
# Blocks besides its own that a row may choose where threads keep them in registers. On an H100, 131,072 tokens of 16
# heads, ms of the other kernel and of this one: D = 64, B = 128, k = 8: 3.44, 1.43; D = 128, B = 128, k = 8: 3.52,
# 1.88; D = 128, B = 512, k = 8: 1.44, 0.94; D = 128, B = 4096, k = 12: 0.86, 0.94.
MAX_SELECTED = 15
ELEMENTS = {torch.bfloat16: "bfloat16", torch.float16: "float16"}

try:
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    from .dkdv import dkdv_kernel
    from .dkdv_rows import dkdv_rows_kernel
    from .dq import dq_kernel
    from .long_blocks import long_block_kernel
    from .select import WIDTH, select_kernel
    from .short_blocks import short_block_kernel

    MISSING = ""
except (ImportError, AttributeError) as error:
    MISSING = f"{type(error).__name__}: {error}"

LOG = logging.getLogger(__name__)


class Verdict(NamedTuple):
    """Whether these kernels serve a GPU in this process, and :func:`serving`'s line."""

    serves: bool
    line: str
    final: bool = True


_verdicts: dict[torch.device, Verdict] = {}
_deciding = threading.RLock()
# The check of a version of Triton that was not measured; see :func:`check_with`.
_compare: Callable[[torch.device, threading.local], None]
# Set of kernels that the thread which runs the check asks for; other threads do not see it.
_forced = threading.local()


def check_with(compare: Callable[[torch.device, threading.local], None]) -> None:
    """Sets the check that a version of Triton has to pass if it was not measured; called once, on import.

    The check calls functions that call this module, so this module cannot import it.
    """
    global _compare
    _compare = compare


def runs_on(device: torch.device) -> bool:
    """Whether these kernels serve a GPU: decided at first use, and remembered until the process ends."""
    return (_verdicts.get(device) or _decide(device)).serves


def serving(device: torch.device | str) -> str:
    """One line: which kernels serve tensors of ``device`` in this process and, where it is a Hopper GPU, why not all.

    The first call for a Hopper GPU with a version of Triton that was not measured compiles and compares kernels, which
    can take a minute.
    """
    device = torch.device(device)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    return (_verdicts.get(device) or _decide(device)).line


def _decide(device: torch.device) -> Verdict:
    forced = getattr(_forced, "serves", None)
    if forced is not None:
        return Verdict(forced, "being checked")
    with _deciding:
        if device not in _verdicts:
            verdict = _examine(device)
            if not verdict.final:
                return verdict
            _verdicts[device] = verdict
            could_serve = is_hopper(device) and not verdict.serves
            LOG.log(logging.WARNING if could_serve else logging.INFO, "%s: %s", device, verdict.line)
        return _verdicts[device]


def _examine(device: torch.device) -> Verdict:
    name = f"Triton {triton.__version__}"
    if device.type != "cuda":
        return Verdict(False, f"portable kernels in the interpreter of {name}: {device.type} is not a GPU")
    if not is_hopper(device):
        return Verdict(False, f"portable kernels ({name}): {torch.cuda.get_device_name(device)} is not a Hopper GPU")
    if MISSING:
        return Verdict(False, f"portable kernels: {name} lacks what those for Hopper need ({MISSING})")
    version = tuple(int(number) for number in re.findall(r"\d+", triton.__version__)[:2])
    if version < MEASURED[0]:
        return Verdict(False, f"portable kernels: those for Hopper need Triton {MEASURED[0][0]}.{MEASURED[0][1]}")
    if version in MEASURED:
        return Verdict(True, f"kernels for Hopper where they are faster, else portable ones ({name})")
    if torch.cuda.is_current_stream_capturing():
        return Verdict(False, f"portable kernels: no check of {name} while a CUDA graph is captured", final=False)
    try:
        _compare(device, _forced)
    except Exception as error:
        reason = (str(error).strip().splitlines() or [""])[0]
        what = f"those for Hopper failed their check with {name}: {type(error).__name__}: {reason}"
        return Verdict(False, f"portable kernels: {what}")
    finally:
        _forced.serves = None
    return Verdict(True, f"kernels for Hopper where they are faster, else portable ones ({name}, checked at first use)")


def serves(q: Tensor, pages, scale: float, dout: Tensor | None = None, share: int = 1) -> bool:
    """Whether a call can run here: 16-bit inputs, D of 64 or 128, whole tiles of 64 or 128 keys, rows that TMA can
    fetch; blocks of one tile, where ``share`` heads have one selection.

    A backward's call gives ``dout`` [N, Hq, D] too, and is of bfloat16, in which partial dQ are.
    """
    return (
        runs_on(q.device)
        and (share == 1 or pages.block_size <= 128)
        and q.dtype in ELEMENTS
        and q.shape[2] in HEAD_DIMS
        and (pages.block_size == 64 or pages.block_size % 128 == 0)
        and scale > 0
        and all(_is_regular(x) for x in (q, pages.k, pages.v))
        and (dout is None or q.dtype == torch.bfloat16 and _is_regular(dout))
    )


def selects(q: Tensor, n_slots: int) -> bool:
    """Whether the choice of ``n_slots`` blocks for each row of q [N, Hq, D] can run here."""
    return runs_on(q.device) and q.dtype in ELEMENTS and q.shape[2] in HEAD_DIMS and n_slots <= MAX_SELECTED


def _is_regular(x: Tensor) -> bool:
    """Whether rows of x [T, H, D] begin at multiples of 16 bytes, with columns of all heads that fit 32 bits."""
    s_row, s_head, _ = x.stride()
    aligned = x.data_ptr() % 16 == 0 and s_row % 16 == 0 and s_head % 16 == 0
    return aligned and s_row > 0 and x.shape[0] < 2**31 and (x.shape[1] - 1) * s_head + x.shape[2] < 2**31


@lru_cache
def _box_layout(rows: int, dim: int, dtype: torch.dtype):
    return gl.NVMMASharedLayout.get_default_for([rows, dim], getattr(gl, ELEMENTS[dtype]))


def _boxes(x: Tensor, rows: int):
    """TMA descriptor of boxes of ``rows`` rows of one head, in x [T, H, D] seen as [T, columns]."""
    n_rows, n_heads, dim = x.shape
    layout = _box_layout(rows, dim, x.dtype)
    shape = [n_rows, (n_heads - 1) * x.stride(1) + dim]
    return TensorDescriptor(x, shape, [x.stride(0), 1], [rows, dim], layout)


def launch_select(q: Tensor, means: Tensor, first: Tensor, current_block: Tensor, block_indices: Tensor) -> None:
    """See :func:`..select.select_blocks`."""
    n_rows, n_heads, dim = q.shape
    select_kernel[(cdiv(n_rows, WIDTH.value), n_heads)](
        q=q, means=means, first=first, current_block=current_block, block_indices=block_indices, n_rows=n_rows,
        s_qt=q.stride(0), s_qh=q.stride(1), s_mb=means.stride(0), s_mh=means.stride(1),
        HQ=n_heads, G=n_heads // means.shape[1], D=dim, S=block_indices.shape[2], **launch_options(1),
    )  # fmt: skip


def _kv_args(part, tile: Tile) -> dict:
    """K and V of a slice (``part``, of :mod:`..launches`), and descriptors of boxes of a tile of keys."""
    return dict(k_desc=_boxes(part.k, tile.bn), v_desc=_boxes(part.v, tile.bn), k=part.k, v=part.v)


def launch_forward(part, tile: Tile, tasks, parts: Tensor, parts_lse: Tensor, scale_log2: float) -> None:
    """Partial outputs and log-sum-exps of the visits of a slice (``part``, of :mod:`..launches`)."""
    is_short = part.block_size <= tile.bn
    kernel = short_block_kernel if is_short else long_block_kernel
    kernel[part.grid(tasks)](
        q=part.q, **_kv_args(part, tile), part=parts, part_lse=parts_lse,
        visits=part.routing.visits, tasks=tasks.table, list_start=part.list_start, visible=part.visible,
        scale_log2=scale_log2, **part.task_args(tasks), n_blocks=part.n_blocks, n_heads=part.n_heads,
        **part.q_strides, **part.kv_strides, TASK_ROWS=tasks.rows, G=part.group,
        **({"SHARE": part.share} if is_short else {}), S=part.n_selected, SLOTS=part.n_slots, D=part.dim,
        BM=tile.bm, BN=tile.bn, STAGES=tile.stages, REGISTERS=tile.producer_registers, **launch_options(tile.warps),
    )  # fmt: skip


def launch_dkdv(
    part, tile: Tile, tasks, key_tiles: int, dout: Tensor, part_dq: Tensor, grads, table, stats, task_info
) -> None:
    """dK and dV of a slice, and partial dQ where ``key_tiles`` is 1; ``grads`` of :mod:`..launches`."""
    kernel = dkdv_rows_kernel if tile.bn == 64 else dkdv_kernel
    kernel[part.grid(tasks, key_tiles)](
        q=part.q, dout=dout, **_kv_args(part, tile), part=part_dq, dk=grads.dk, dv=grads.dv,
        sum_k=grads.sum_k, sum_v=grads.sum_v, table=table, stats=stats, task_info=task_info,
        scale=part.scale, room=part.n_visits, block_size=part.block_size, first_head=grads.first_head,
        **part.kv_strides, s_dkr=grads.dk.stride(0), s_dkh=grads.dk.stride(1),
        SHARE=part.share, D=part.dim, BM=tile.bm, BN=tile.bn // 2, KEY_TILES=key_tiles, DQ=key_tiles == 1,
        DIRECT=grads.sum_k is not None, STAGES=tile.stages, REGISTERS=tile.producer_registers,
        **launch_options(tile.warps),
    )  # fmt: skip


def launch_dq(part, tile: Tile, tasks, dout: Tensor, part_dq: Tensor, table, stats) -> None:
    """Partial dQ of the visits of a slice."""
    dq_kernel[part.grid(tasks)](
        q=part.q, dout=dout, **_kv_args(part, tile), part=part_dq, table=table, stats=stats,
        tasks=tasks.table, list_start=part.list_start, scale=part.scale, room=part.n_visits,
        **part.task_args(tasks), **part.kv_strides, TASK_ROWS=tasks.rows, D=part.dim,
        BM=tile.bm, BN=tile.bn, STAGES=tile.stages, REGISTERS=tile.producer_registers, **launch_options(tile.warps),
    )  # fmt: skip
