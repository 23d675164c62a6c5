"""What the kernels of this folder share: synchronization of warpgroups, loads of K and V, stores of results.

Warpgroups pass buffers in shared memory to one another by mbarriers. Each buffer has two: *full* completes when the
data has arrived, *empty* when all readers are done. An mbarrier counts phases; ``wait(barrier, parity)`` waits for the
end of the last phase of that parity. No warpgroup gets more than one phase ahead of a buffer, so the parity of the
phase is enough: ``use // STAGES % 2`` for full, the opposite for empty, where the first wait returns at once.

cp.async and ordinary stores write shared memory through the generic proxy, matrix instructions and TMA access it
through the async proxy: a fence orders the two.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import async_copy, fence_async_shared, mbarrier, tma

from ..routing import read_task as _read_task

# The first name is that of later versions of Triton: from 3.7 on, and from 3.9 on.
barrier = getattr(gl, "barrier", None) or gl.thread_barrier
load_box = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
copy_rows = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared

read_task = gluon.jit(_read_task.fn)


@gluon.jit
def publish(full):
    """Makes what this warpgroup copied by cp.async, or stored, visible to the other warpgroups' matrix instructions."""
    async_copy.wait_group(0)
    fence_async_shared()
    barrier()
    mbarrier.arrive(full, count=1)


@gluon.jit
def tiles_of_keys(limit, BN: gl.constexpr):
    """How many tiles of keys rows with these limits see in all, at least 1, and how many all of them see whole.

    Limit 0 is that of rows past the end. In a layout of :func:`in_each_warp` warps exchange nothing for it.
    """
    most = gl.max(limit, 0)
    least = gl.min(gl.where(limit > 0, limit, 2147483647), 0)
    return gl.maximum((most + BN - 1) // BN, 1), least // BN


@gluon.constexpr_function
def in_each_warp(n):
    """Layout of ``n`` elements, a multiple of 32, all of which each of four warps holds."""
    return gl.SliceLayout(1, gl.BlockedLayout([n // 32, 1], [32, 1], [1, 4], [0, 1]))


@gluon.constexpr_function
def _quads(dim, columns):
    """Layout of an output [64, dim] whose rows lie as in the accumulators of wgmma: a quad of threads has the row.

    The first steps in ``columns`` are those of a thread's registers, the next two count the threads of a quad.
    """
    *near, low, high = columns
    far = [n for n in (1, 2, 4, 8, 16, 32, 64) if n < dim and n not in columns]
    return gl.DistributedLinearLayout(
        [[0, n] for n in (*near, *far)] + [[8, 0]], [[0, low], [0, high], [1, 0], [2, 0], [4, 0]],
        [[16, 0], [32, 0]], [], [64, dim],
    )  # fmt: skip


@gluon.constexpr_function
def side_by_side(dim, dtype):
    """Layout of an output [64, dim] in which a thread has 16 bytes side by side, and a quad of threads 64."""
    return _quads(dim, (1, 2, 8, 4) if dtype.primitive_bitwidth == 32 else (1, 2, 4, 8, 16))


@gluon.jit
def exchange(x, dtype: gl.constexpr):
    """An accumulator x [64, 64 or D] of wgmma, rounded to ``dtype``, in the layout of :func:`side_by_side`.

    In the accumulator a thread has 2 columns of every 8; quads exchange them. One bit of the thread index is swapped
    with one bit of the column at a time, which Triton does by shuffles; both at once would go through shared memory,
    for which the dQ kernel has no room.
    """
    x = gl.convert_layout(x.to(dtype), _quads(x.shape[1], (1, 2, 8, 4)))
    return gl.convert_layout(x, side_by_side(x.shape[1], dtype))


@gluon.jit
def q_rows(table, o_r, end, SHARE: gl.constexpr):
    """Rows of Q and dout of the rows ``o_r`` of a list, 0 past its end."""
    return gl.load(table + o_r // SHARE, mask=o_r < end, other=0) + o_r % SHARE


@gluon.jit
def out_rows(table, o_r, end, SHARE: gl.constexpr):
    """Rows of partial dQ of the rows ``o_r`` of a list, by a table of visits; -1 past its end."""
    first = gl.load(table + o_r // SHARE, mask=o_r < end, other=-1)
    return gl.where(first >= 0, first + o_r % SHARE, -1)


@gluon.jit
def store_rows(out, out_row, x, D: gl.constexpr):
    """Writes an accumulator x [64, 64 or D], rounded, to rows ``out_row`` [64] of out [., D], none where -1."""
    QUADS: gl.constexpr = side_by_side(x.shape[1], out.dtype.element_ty)
    x = exchange(x, out.dtype.element_ty)
    out_row = gl.convert_layout(out_row, gl.SliceLayout(1, QUADS), assert_trivial=True)
    o_d = gl.arange(0, x.shape[1], layout=gl.SliceLayout(0, QUADS))  # [columns of x]
    gl.store(out + out_row.to(gl.int64)[:, None] * D + o_d[None, :], x, mask=(out_row >= 0)[:, None])


@gluon.jit
def unpack(stats):
    """Log-sum-exp (base 2) and delta, as the backward's table has them."""
    lse = (stats & 0xFFFFFFFF).to(gl.int32).to(gl.float32, bitcast=True)
    return lse, (stats >> 32).to(gl.int32).to(gl.float32, bitcast=True)


@gluon.jit
def load_block(desc, x, first_key, column, s_row, n_keys, full, x_s, ROWS: gl.constexpr, D: gl.constexpr):
    """Starts loading ROWS rows of K or V, as far as the block goes; one arrival at ``full``, with the bytes of a TMA
    load still expected."""
    if n_keys >= ROWS:
        mbarrier.expect(full, ROWS * D * 2)
        load_box(desc, [first_key, column], full, x_s)
    else:
        _copy_keys(x, first_key, column, s_row, n_keys, x_s, ROWS, D)
        fence_async_shared()
        barrier()
        mbarrier.arrive(full, count=1)


@gluon.jit
def load_blocks(
    k_desc, v_desc, k, v, first_key, k_column, v_column, s_kr, s_vr, n_keys, full, k_s, v_s,
    ROWS: gl.constexpr, D: gl.constexpr,
):  # fmt: skip
    """As :func:`load_block`, for K and V together; one arrival."""
    if n_keys >= ROWS:
        mbarrier.expect(full, 2 * ROWS * D * 2)
        load_box(k_desc, [first_key, k_column], full, k_s)
        load_box(v_desc, [first_key, v_column], full, v_s)
    else:
        _copy_keys(k, first_key, k_column, s_kr, n_keys, k_s, ROWS, D)
        _copy_keys(v, first_key, v_column, s_vr, n_keys, v_s, ROWS, D)
        fence_async_shared()
        barrier()
        mbarrier.arrive(full, count=1)


@gluon.jit
def _copy_keys(x, first_key, column, s_row, n_keys, x_s, ROWS: gl.constexpr, D: gl.constexpr):
    """The rows that a block has, and zeros: what follows may be another document's NaN, and 0 * NaN is NaN."""
    WIDE: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    o_d = gl.arange(0, D, layout=gl.SliceLayout(0, WIDE))  # [D]
    for n in gl.static_range(0, ROWS, 16):
        o_n = n + gl.arange(0, 16, layout=gl.SliceLayout(1, WIDE))  # [16]
        p_x = x + column + (first_key + o_n).to(gl.int64)[:, None] * s_row + o_d[None, :]  # [16, D]
        x_s.slice(n, 16).store(gl.load(p_x, mask=(o_n < n_keys)[:, None], other=0.0))
