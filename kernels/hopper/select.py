"""Scores and top-k where a row's choice fits registers: every thread has a row.

Legend: N query rows, Hq query heads, Hkv key/value heads, G = Hq // Hkv, D head dim, n blocks, S = top_k - 1.

A program is one warp with 32 rows, for which it streams 32 block means at a time, from the newest candidate to the
oldest, as :mod:`..select` does and with the same result. Scores are exchanged within the warp so that each thread has
all those of its row. It compares them with its S-th best so far and sets a bit for each that may be better; threads
then handle their bits one by one, newest first. On long sequences the worst of 32 rows has two or three, and threads
exchange nothing but whether any of them has a bit left. The kept scores of a row are sorted, and a score is inserted
behind its equals, which are newer.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2

from ..sort_keys import EMPTY, NAN
from ..sort_keys import ordered as _ordered

ordered = gluon.jit(_ordered.fn)

# Of rows and of blocks: the threads of a warp, and the bits of a number.
WIDTH = gl.constexpr(32)
# Bits that are handled before the rest is compared with the new S-th best.
PASSES = gl.constexpr(8)
ROWS = gl.constexpr(gl.BlockedLayout([1], [32], [1], [0]))


@gluon.jit
def _columns(x):
    """Columns of x [WIDTH, WIDTH], whose rows are threads."""
    parts = (x,)
    for level in gl.static_range(5):
        halves = ()
        for i in gl.static_range(1 << level):
            pairs = parts[i].reshape([WIDTH, 2, WIDTH >> level + 1]).permute((0, 2, 1))
            halves = halves + gl.split(pairs)
        parts = halves
    columns = ()
    for i in gl.static_range(WIDTH):
        columns = columns + (gl.convert_layout(parts[i].reshape([WIDTH]), ROWS, assert_trivial=True),)
    return columns


@gluon.jit
def _better(columns, worst):
    """A bit for each column that is not at most ``worst``; NaN is not, and nothing is at most NaN."""
    bits = gl.zeros([WIDTH], gl.int32, ROWS)  # [WIDTH]
    for i in gl.static_range(WIDTH):
        bits |= gl.where(columns[i] <= worst, 0, 1 << i if i < 31 else -(1 << 31))
    return bits


@gluon.jit
def _pick(columns, i):
    """Element ``i`` [WIDTH] of each row."""
    for level in gl.static_range(5):
        is_odd = (i >> level & 1) != 0  # [WIDTH]
        halves = ()
        for j in gl.static_range(WIDTH >> level + 1):
            halves = halves + (gl.where(is_odd, columns[2 * j + 1], columns[2 * j]),)
        columns = halves
    return columns[0]


@gluon.jit
def _insert(sort_keys, blocks, sort_key, block, S: gl.constexpr):
    """Inserts ``sort_key`` behind the equal ones and drops the last."""
    was_ahead = sort_key > sort_keys[0]  # [WIDTH]
    new_keys = (gl.where(was_ahead, sort_key, sort_keys[0]),)
    new_blocks = (gl.where(was_ahead, block, blocks[0]),)
    for s in gl.static_range(1, S):
        is_ahead = sort_key > sort_keys[s]  # [WIDTH]
        new_keys = new_keys + (gl.where(was_ahead, sort_keys[s - 1], gl.where(is_ahead, sort_key, sort_keys[s])),)
        new_blocks = new_blocks + (gl.where(was_ahead, blocks[s - 1], gl.where(is_ahead, block, blocks[s])),)
        was_ahead = is_ahead
    return new_keys, new_blocks


@gluon.jit
def _score(sort_key):
    """The score of a sort key, NaN for none."""
    score = (sort_key ^ ((sort_key >> 31) & 0x7FFFFFFF)).to(gl.float32, bitcast=True)  # [WIDTH]
    return gl.where(sort_key <= NAN, float("nan"), score)


@gluon.jit(do_not_specialize=["n_rows"])
def select_kernel(
    q, means, first, current_block, block_indices, n_rows, s_qt, s_qh, s_mb, s_mh,
    HQ: gl.constexpr, G: gl.constexpr, D: gl.constexpr, S: gl.constexpr,
):  # fmt: skip
    """Arguments as of :func:`..select._select_kernel`."""
    MMA: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [1, 1], [16, 8])
    # A thread's elements of D lie together, as far as one load goes.
    LEFT: gl.constexpr = gl.DotOperandLayout(0, MMA, 8)
    RIGHT: gl.constexpr = gl.DotOperandLayout(1, MMA, 8)
    WHOLE: gl.constexpr = gl.BlockedLayout([1, WIDTH], [32, 1], [1, 1], [1, 0])
    # Late rows have the most candidates: they start first, so that the last programs to run are short.
    begin = (gl.num_programs(0) - 1 - gl.program_id(0)) * WIDTH
    i_h = gl.program_id(1)
    o_r = begin + gl.arange(0, WIDTH, layout=ROWS)  # [WIDTH]
    b_first = gl.load(first + o_r, mask=o_r < n_rows, other=2147483647)  # [WIDTH]
    b_current = gl.load(current_block + o_r, mask=o_r < n_rows, other=-1)  # [WIDTH]
    oldest = gl.maximum(gl.min(b_first, 0), 0)
    newest = gl.max(b_current, 0) - 1

    o_m = begin + gl.arange(0, WIDTH, layout=gl.SliceLayout(1, LEFT))  # [WIDTH]
    o_d = gl.arange(0, D, layout=gl.SliceLayout(0, LEFT))  # [D]
    p_q = q + (o_m.to(gl.int64) * s_qt + i_h.to(gl.int64) * s_qh)[:, None] + o_d[None, :]  # [WIDTH, D]
    b_q = gl.load(p_q, mask=(o_m < n_rows)[:, None], other=0.0)  # [WIDTH, D]
    o_n = gl.arange(0, WIDTH, layout=gl.SliceLayout(0, RIGHT))  # [WIDTH]
    # [D, 1]
    p_means = means + (i_h // G).to(gl.int64) * s_mh + gl.arange(0, D, layout=gl.SliceLayout(1, RIGHT))[:, None]

    sort_keys, blocks = (), ()
    for _ in gl.static_range(S):
        sort_keys = sort_keys + (gl.full([WIDTH], EMPTY, gl.int32, ROWS),)
        blocks = blocks + (gl.full([WIDTH], -1, gl.int32, ROWS),)
    worst = _score(sort_keys[S - 1])  # [WIDTH]
    for behind in range(0, newest - oldest + 1, WIDTH):
        top = newest - behind
        o_b = top - o_n  # [WIDTH]
        # [D, WIDTH]
        b_mean = gl.load(p_means + (o_b.to(gl.int64) * s_mb)[None, :], mask=(o_b >= oldest)[None, :], other=0.0)
        score = mma_v2(b_q, b_mean, gl.zeros([WIDTH, WIDTH], gl.float32, MMA))  # [WIDTH, WIDTH]
        columns = _columns(gl.convert_layout(score, WHOLE))
        # Column c is block top - c: candidates are those from ``low`` on, up to ``high``.
        low = gl.maximum(top - b_current + 1, 0)  # [WIDTH]
        high = top - b_first  # [WIDTH]
        allowed = gl.where(low < WIDTH, -1 << gl.minimum(low, 31), 0)  # [WIDTH]
        allowed &= gl.where(high < 31, (2 << gl.maximum(gl.minimum(high, 30), 0)) - 1, -1)
        bits = _better(columns, worst) & gl.where(high >= 0, allowed, 0)  # [WIDTH]
        left = gl.max((bits != 0).to(gl.int32), 0)
        while left > 0:
            passes = 0
            while (left > 0) & (passes < PASSES):
                lowest = bits & -bits  # [WIDTH]
                column = gl.inline_asm_elementwise(
                    "bfind.u32 $0, $1;", "=r,r", [lowest], dtype=gl.int32, is_pure=True, pack=1
                )
                sort_key = gl.where(bits != 0, ordered(_pick(columns, column)), EMPTY)  # [WIDTH]
                sort_keys, blocks = _insert(sort_keys, blocks, sort_key, top - column, S)
                bits ^= lowest
                left = gl.max((bits != 0).to(gl.int32), 0)
                passes += 1
            worst = _score(sort_keys[S - 1])
            if left > 0:
                bits &= _better(columns, worst)
                left = gl.max((bits != 0).to(gl.int32), 0)

    p_indices = block_indices + (o_r.to(gl.int64) * HQ + i_h) * S  # [WIDTH]
    for s in gl.static_range(S):
        gl.store(p_indices + s, blocks[s], mask=o_r < n_rows)
