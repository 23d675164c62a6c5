"""Time of attention against sequence length, as a PNG."""

STYLES = {
    "cudnn": ("dense, cuDNN", "tab:red"),
    "flash": ("dense, FlashAttention-2", "tab:orange"),
    "fa4": ("dense, flash-attn-4", "tab:green"),
}


def draw(path: str, rows, environment: dict[str, str]) -> None:
    """Draw measured ``rows`` (:class:`moba_cp.bench.attention.Row`), which differ in T alone.

    Where dense attention was not measured it is drawn dashed, with the square of T from its longest measured sequence.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 4.6), sharey=True)
    tokens = [row.shape[0] for row in rows]
    for axis, title, pick in zip(
        axes, ("forward", "forward + backward"), (lambda t: t.forward, lambda t: t.forward_backward)
    ):
        axis.plot(tokens, [pick(row.moba) for row in rows], "o-", color="tab:blue", label="MoBA, this library")
        for name, (label, color) in STYLES.items():
            measured = [(row.shape[0], pick(row.dense[name])) for row in rows if name in row.dense]
            if not measured:
                continue
            axis.plot(*zip(*measured), "s-", color=color, label=label)
            last, time = measured[-1]
            beyond = [(n, time * (n / last) ** 2) for n in tokens if n >= last]
            if len(beyond) > 1:
                axis.plot(*zip(*beyond), "s--", color=color, fillstyle="none", label=f"{label}, extrapolated")
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set_xticks(tokens, [f"{n // 1024}K" if n < 2**20 else f"{n // 2**20}M" for n in tokens])
        axis.set_xlabel("tokens")
        axis.set_title(title)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("ms")
    axes[0].legend(fontsize=8)
    _, n_q, n_kv, dim, block_size, top_k = rows[0].shape
    figure.suptitle(
        f"{n_q} query heads, {n_kv} KV heads, head dim {dim}, block {block_size}, top-k {top_k}, bf16, causal\n"
        f"{environment['gpu']}, PyTorch {environment['torch']}, Triton {environment['triton']}, "
        f"commit {environment['commit']}",
        fontsize=9,
    )
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)
