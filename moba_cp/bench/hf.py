"""``moba-cp bench transformers``: a random model of Llama's shape through transformers, with MoBA and with sdpa.

A training step with gradient checkpointing; a prompt in pieces; tokens one by one after it. First what a
cache gives in pieces is held against the whole.

Legend: T tokens of a sequence or a prompt, B block size, k top-k.
"""

import argparse
import json
import statistics
import time

import torch
from torch.profiler import ProfilerActivity, profile

from ..attention import full_attention, moba_attention
from ..cache import KVCache
from ..config import MoBAConfig
from ..model.loss import linear_cross_entropy
from .environment import environment

SEED = 0


def main(args: argparse.Namespace) -> int:
    """Run the command; returns the exit code: 1 if the check failed.

    Raises:
        ValueError: there is no GPU.
    """
    if not torch.cuda.is_available():
        raise ValueError("bench transformers measures a GPU, and torch.cuda sees none")
    report = {"environment": environment(torch.device("cuda")), "rows": []}
    failed = False
    for part in args.parts:
        begun = time.perf_counter()
        try:
            rows = {"check": check, "train": train, "prefill": prefill}[part](args)
        except (RuntimeError, AssertionError) as error:
            failed |= part == "check"
            rows = [{"part": part, "error": f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"}]
        torch.cuda.empty_cache()
        for row in rows:
            print(" ".join(f"{name}={_shown(value)}" for name, value in row.items()), flush=True)
        report["rows"] += rows
        print(f"{part}: {time.perf_counter() - begun:.0f} s", flush=True)
        if args.json:
            args.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return int(failed)


def _shown(value) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def check(args: argparse.Namespace) -> list[dict]:
    """Pieces and tokens through a cache, padded in front, against each sequence at once without its padding."""
    rows = []
    for heads, dim, size, top_k, n_tokens in (((32, 8), 64, 512, 8, 9_000), ((4, 2), 128, 64, 12, 3_000)):
        g = torch.Generator("cuda").manual_seed(SEED)
        draw = lambda h: torch.randn(2, n_tokens, h, dim, generator=g, device="cuda", dtype=torch.bfloat16)
        q, k, v = draw(heads[0]), draw(heads[1]), draw(heads[1])
        padding = torch.tensor([0, 777], dtype=torch.int64, device="cuda")
        config, cache = MoBAConfig(size, top_k), KVCache(size)
        parts, at = {"moba": [], "full": []}, 0
        for piece in (n_tokens - 1_000, 900, *[1] * 60, 40):
            here, at = slice(at, at + piece), at + piece
            cache.append(k[:, here], v[:, here])
            parts["moba"].append(cache.moba_attention(q[:, here], config, padding=padding))
            parts["full"].append(cache.full_attention(q[:, here], padding=padding))
        for kind, outs in parts.items():
            out = torch.cat(outs, 1)
            for i, skip in enumerate(padding.tolist()):
                x = q[i, skip:], k[i, skip:], v[i, skip:]
                whole = moba_attention(*x, config) if kind == "moba" else full_attention(*x)
                error = (out[i, skip:].float() - whole.float()).abs().amax(-1) / whole.abs().max()
                # Scores are summed in another order for few rows: where two are as good as equal, a row gets another
                # block, and another result.
                few = (error[-100:] > 0.02).float().mean().item()
                many = (error[:-100] > 0.02).float().mean().item()
                rows.append({"part": "check", "attention": _named(kind, (size, top_k)), "sequence": i,
                             "median error": error.median().item(), "prompt rows that differ": many,
                             "later rows that differ": few})  # fmt: skip
                assert many == 0 and few < (0.01 if kind == "moba" else 1e-9), rows[-1]
    return rows


def _model(args: argparse.Namespace):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=args.vocabulary, hidden_size=2048, intermediate_size=8192, num_hidden_layers=args.layers,
        num_attention_heads=32, num_key_value_heads=8, head_dim=64, max_position_embeddings=1 << 20,
        tie_word_embeddings=True, rope_theta=500_000.0,
    )  # fmt: skip
    torch.manual_seed(SEED)
    with torch.device("cuda"):
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.bfloat16)
        try:
            return LlamaForCausalLM(config)
        finally:
            torch.set_default_dtype(before)


def train(args: argparse.Namespace) -> list[dict]:
    """Seconds of a training step (forward, recomputation, backward, AdamW) with sdpa and with MoBA."""
    from ..hf import use_moba

    model = _model(args).train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    ids = torch.randint(args.vocabulary, (1, args.train_tokens), device="cuda")
    labels = torch.cat([ids[0, 1:], ids.new_full((1,), -100)])

    def step() -> None:
        hidden = model.model(ids, use_cache=False).last_hidden_state[0]
        loss = linear_cross_entropy(hidden, model.lm_head.weight, labels, reduction="sum")
        (loss / len(labels)).backward()
        optimizer.step()
        optimizer.zero_grad()

    rows = []
    for name, options in (*(("moba", x) for x in args.moba), ("sdpa", None)):
        if options is not None:
            use_moba(model, *options)
        else:
            model.set_attn_implementation("sdpa")
        if options is not None:
            # What is not attention is compiled by the first of these.
            step()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        seconds = [_seconds(step) for _ in range(1 if options is None else 2)]
        rows.append({"part": "train", "tokens": args.train_tokens, "attention": _named(name, options),
                     "seconds": min(seconds), "peak_gib": torch.cuda.max_memory_allocated() / 2**30})  # fmt: skip
    dense = rows[-1]["seconds"]
    return [row | {"times as fast": dense / row["seconds"]} for row in rows]


@torch.inference_mode()
def prefill(args: argparse.Namespace) -> list[dict]:
    """Seconds of a prompt in pieces; milliseconds of a token after it, and of one layer's attention."""
    from ..hf import MoBACache, decoding_graph, use_moba

    rows = []
    options = args.moba[0]
    model = use_moba(_model(args).eval(), *options)
    # Kernels are compiled before the clock runs.
    warm = MoBACache(model, 3 * args.piece)
    for n in (args.piece, args.piece, 1, 1):
        model(torch.randint(args.vocabulary, (1, n), device="cuda"), past_key_values=warm, logits_to_keep=1)
    del warm
    cache = MoBACache(model, args.prompt_tokens + 256)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    begun = last = time.perf_counter()
    for done in range(0, args.prompt_tokens, args.piece):
        ids = torch.randint(args.vocabulary, (1, min(args.piece, args.prompt_tokens - done)), device="cuda")
        model(ids, past_key_values=cache, logits_to_keep=1)
        torch.cuda.synchronize()
        last, before = time.perf_counter(), last
    row = {"part": "prefill", "tokens": args.prompt_tokens, "piece": args.piece, "attention": _named("moba", options),
           "seconds": last - begun, "seconds of the last piece": last - before,
           "cache_gib": cache.nbytes / 2**30, "peak_gib": torch.cuda.max_memory_allocated() / 2**30}  # fmt: skip
    rows.append(row)
    print(" ".join(f"{name}={_shown(value)}" for name, value in row.items()), flush=True)
    config, layers = MoBAConfig(*options[:2]), [layer.tokens for layer in cache.layers]
    q = torch.randn(1, 1, 32, 64, device="cuda", dtype=torch.bfloat16)
    for kind in ("moba", "full"):
        use_moba(model, *options, decoding=kind)
        token = torch.randint(args.vocabulary, (1, 1), device="cuda")
        times = [_seconds(lambda: model(token, past_key_values=cache)) for _ in range(24)]
        with decoding_graph(model, cache):
            by_graph = [_seconds(lambda: model(token, past_key_values=cache)) for _ in range(24)]
        one = (lambda x: x.moba_attention(q, config)) if kind == "moba" else (lambda x: x.full_attention(q))
        ms = _kernel_ms(lambda: [one(layer) for layer in layers]) / len(layers)
        rows.append({"part": "decoding", "tokens": args.prompt_tokens, "attention": kind,
                     "ms of a token": 1e3 * statistics.median(times[4:]),
                     "by a CUDA graph": 1e3 * statistics.median(by_graph[4:]),
                     "ms of one layer's attention": ms})  # fmt: skip
    return rows[1:]


def _named(name: str, options) -> str:
    return name if options is None else f"{name} B={options[0]} k={options[1]}"


def _seconds(function) -> float:
    torch.cuda.synchronize()
    begun = time.perf_counter()
    function()
    torch.cuda.synchronize()
    return time.perf_counter() - begun


def _kernel_ms(function, repeats: int = 5) -> float:
    """What the GPU computes in a call, without the waits for the host between its kernels."""
    for _ in range(2):
        function()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(repeats):
            function()
        torch.cuda.synchronize()
    return sum(event.self_device_time_total for event in profiler.key_averages()) / 1e3 / repeats
