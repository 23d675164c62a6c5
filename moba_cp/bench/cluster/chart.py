"""Speed-up and efficiency against the number of ranks, as a PNG."""

from .goals import efficiency
from .measure import FULL, MOBA, PEER
from .rows import Report

COLORS = {
    "moba auto": "tab:blue", "moba kv": "tab:cyan", "moba query": "tab:purple", "moba allgather": "tab:green",
    "moba auto-nccl": "navy", "moba allgather-nccl": "tab:olive",
    "full": "tab:orange", "torch allgather": "tab:red", "torch alltoall": "tab:pink",
}  # fmt: skip
LINES = ("-", "--", ":", "-.")


def baseline(name: str) -> str:
    """The row on one rank that ``name`` is compared with."""
    return {MOBA: MOBA, FULL: FULL, PEER: f"{PEER} cudnn"}[name.split()[0]]


def draw(path: str, report: Report) -> bool:
    """Draw what was measured on one rank and more; False if nothing was."""
    rows = [row for row in report.rows if row.part == "attention" and row.ranks > 1 and row.both]
    series: dict[tuple[str, int], list[tuple[int, float]]] = {}
    for row in rows:
        share = efficiency(report, row.tokens, row.ranks, row.name, baseline(row.name))
        if share is not None:
            series.setdefault((row.name, row.tokens), []).append((row.ranks, share))
    if not series:
        return False
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    # The longest sequence of each, and the longest that everything was measured with.
    names = list(dict.fromkeys(name for name, _ in series))
    lengths = {name: {n for other, n in series if other == name} for name in names}
    common = set.intersection(*lengths.values())
    shown = {name: sorted({max(found), max(common)} if common else {max(found)}) for name, found in lengths.items()}
    most = max(row.ranks for row in rows)
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.8))
    for (name, tokens), points in series.items():
        if tokens not in shown[name]:
            continue
        sizes, shares = zip(*[(1, 1.0), *sorted(points)])
        line = LINES[shown[name][::-1].index(tokens)]
        style = {"color": COLORS.get(name, "tab:brown"), "linestyle": line, "marker": "o"}
        label = f"{name}, {tokens // 1024}K tokens" if tokens >= 1024 else f"{name}, {tokens} tokens"
        axes[0].plot(sizes, [p * share for p, share in zip(sizes, shares)], label=label, **style)
        axes[1].plot(sizes, [100 * share for share in shares], **style)
    sizes = [2**i for i in range(most.bit_length())]
    axes[0].plot(sizes, sizes, color="grey", linewidth=0.8, label="ideal")
    axes[1].axhline(100, color="grey", linewidth=0.8)
    for axis, label in zip(axes, ("speed-up over one rank", "efficiency, %")):
        axis.set_xscale("log", base=2)
        axis.set_xticks(sizes, [str(size) for size in sizes])
        axis.set_xlabel("ranks")
        axis.set_ylabel(label)
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=7, handlelength=4)
    s, e = report.settings, report.environment
    figure.suptitle(
        f"one layer, forward + backward: {s['heads']} query heads, {s['kv_heads']} KV heads, head dim {s['dim']}, "
        f"block {s['block_size']}, top-k {s['top_k']}, {s['layout']}, {s['gate']} gate\n"
        f"{e['gpu']}, PyTorch {e['torch']}, Triton {e['triton']}, NCCL {e['nccl']}, commit {e['commit']}",
        fontsize=9,
    )
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return True
