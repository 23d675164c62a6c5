"""moba-cp plan: predicted beside measured, what fits, and what to change."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from moba_cp import cli
from moba_cp.doctor.finding import WRONG
from moba_cp.model.attention import AttentionConfig
from moba_cp.model.config import ModelConfig
from moba_cp.model.layer import LayerMemory
from moba_cp.train import measured
from moba_cp.train.config import TrainConfig
from moba_cp.train.memory import MemoryPlan, StepShape, plan_layers
from moba_cp.train.plan_command import _lines
from moba_cp.train.predict import GPUS, candidates, forecast, longest, moba_layer
from moba_cp.train.report import Reporter
from moba_cp.train.yaml_config import build, load

CONFIGS = Path(__file__).parents[2] / "configs"

# The trainer on one H100 80GB (docs/long.md): tokens, recompute -> seconds of a step, GiB on the device, and what the
# layers did: how many kept attention, how many of these in host memory, how many redid nothing.
MEASURED = [
    (32768, "auto", 0.330, 25.5, (0, 0, 14)),
    (131072, "auto", 1.374, 68.5, (3, 0, 11)),
    (131072, "full", 1.69, 18.5, (0, 0, 0)),
    (1048576, "auto", 12.4, 58.3, (14, 12, 0)),
]


def config(seq_len: int = 131072, recompute: str = "auto", top_k: int = 8, **run) -> TrainConfig:
    """542 million parameters, as those were measured with."""
    model = {"n_layers": 14, "hidden_size": 1792, "n_heads": 14, "recompute": recompute}
    attention = {"block_size": 512, "top_k": top_k}
    return build(TrainConfig, {"model": model, "attention": attention, "data": {"seq_len": seq_len},
                               "run": {"dtype": "bfloat16", **run}})  # fmt: skip


@pytest.mark.parametrize("tokens, recompute, seconds, gib, kept", MEASURED)
def test_forecasts_are_near_what_was_measured(tokens, recompute, seconds, gib, kept):
    made, (attention, on_host, nothing) = forecast(config(tokens, recompute), 1, GPUS["h100"]), kept
    layers = [LayerMemory("attention_kept", i < on_host) for i in range(attention)]
    layers = [LayerMemory("full")] * (14 - attention - nothing) + layers + [LayerMemory("none")] * nothing
    # What was free then is not known, so `auto` may choose otherwise here.
    memory = plan_layers(StepShape(config().model, config().attention, tokens, 1, 2), layers).device / 2**30
    print(f"{tokens} {recompute}: {made.step_seconds:.3f} s, {made.step_seconds / seconds - 1:+.1%}; "
          f"{memory:.1f} GiB, {memory / gib - 1:+.1%}")  # fmt: skip
    assert made.step_seconds == pytest.approx(seconds, rel=0.15)
    assert memory == pytest.approx(gib, rel=0.05)


# Four H200s (docs/long.md): config, what was set -> seconds of a step, GiB on each, and what the layers did: how many
# redid all, how many kept attention.
ON_FOUR = [
    ("long/545m_1m", ["data.seq_len=524288", "model.recompute=full"], 1.818, 17.55, (14, 0)),
    ("long/545m_1m", [], 2.941, 127.55, (0, 3)),
    ("long/qwen3_0.6b_4m_4gpus", [], 27.88, 130.8, (21, 7)),
    ("long/llama_8b_1m_4gpus", [], 31.65, 125.8, (24, 8)),
]


@pytest.mark.parametrize("name, overrides, seconds, gib, kept", ON_FOUR)
def test_forecasts_on_four_are_near_what_was_measured(name, overrides, seconds, gib, kept):
    made = load(TrainConfig, CONFIGS / f"{name}.yaml", overrides)
    layers = [LayerMemory("full")] * kept[0] + [LayerMemory("attention_kept")] * kept[1]
    layers += [LayerMemory("none")] * (made.model.n_layers - sum(kept))
    predicted = forecast(made, 4, GPUS["h200"], 4, None, layers)
    assert predicted.step_seconds == pytest.approx(seconds, rel=0.15)
    # A forecast below what is taken lets a run start that runs out of memory.
    assert gib <= predicted.memory.device / 2**30 <= 1.06 * gib


# Attention of one layer, forward and backward, blocks of 512, top-8, D = 128, on H200s (docs/bench_cluster.md):
# tokens, query heads, KV heads, ranks -> ms.
ATTENTION = [
    (131072, 16, 16, 1, 39.3), (131072, 16, 16, 2, 21.0), (131072, 16, 16, 4, 14.2), (262144, 16, 16, 1, 79.9),
    (262144, 16, 16, 2, 44.7), (262144, 16, 16, 4, 27.1), (524288, 16, 16, 1, 168.3), (524288, 16, 16, 2, 95.2),
    (524288, 16, 16, 4, 49.6), (1048576, 16, 16, 1, 353.1), (1048576, 16, 16, 2, 195.8), (1048576, 16, 16, 4, 104.9),
    (262144, 32, 8, 1, 163.2), (524288, 32, 8, 1, 341.2), (524288, 32, 8, 4, 92.2), (1048576, 32, 8, 1, 718.2),
    (1048576, 32, 8, 4, 200.1),
    pytest.param(262144, 32, 8, 4, 41.4, marks=pytest.mark.xfail(strict=True, reason="predicted 22 % too slow")),
]  # fmt: skip


@pytest.mark.parametrize("tokens, heads, kv_heads, ranks, ms", ATTENTION)
def test_attention_is_near_what_was_measured(tokens, heads, kv_heads, ranks, ms):
    model = ModelConfig(n_heads=heads, n_kv_heads=kv_heads, hidden_size=128 * heads)
    seconds = sum(moba_layer(model, AttentionConfig(block_size=512, top_k=8), tokens, ranks))
    print(f"{tokens} {heads} ({kv_heads}) on {ranks}: {1e3 * seconds:.1f} ms, {1e3 * seconds / ms - 1:+.1%}")
    assert 1e3 * seconds == pytest.approx(ms, rel=0.15)


def test_more_ranks_take_less_and_move_more():
    alone, four = (forecast(config(1048576), n, GPUS["h100"]) for n in (1, 4))
    assert four.step_seconds < alone.step_seconds / 2.5 and not alone.bytes and sum(four.bytes.values()) > 1e9
    assert four.memory.host < alone.memory.host
    sixteen = forecast(config(1048576), 16, GPUS["h100"])
    assert any("between nodes" in name for name in sixteen.bytes)


def test_the_longest_sequence_fits_and_a_longer_one_does_not():
    for ranks in (1, 4):
        reach = longest(config(), ranks, GPUS["h100"])
        assert forecast(config(reach), ranks, GPUS["h100"]).memory is not None
        assert forecast(config(int(reach * 1.05) // 4096 * 4096), ranks, GPUS["h100"]).memory is None
    assert reach > 2 * longest(config(), 1, GPUS["h100"])


def test_candidates_fit_and_are_sorted():
    found = candidates(config(32768), 1, GPUS["h100"], 8, None)
    assert [x.context for x in found] == [1]
    many = build(TrainConfig, {"data": {"seq_len": 32768, "sequences_per_step": 8}})
    found = candidates(many, 8, GPUS["h100"], 8, None)
    assert {x.context for x in found} == {1, 2, 4, 8}
    assert [x.step_seconds for x in found] == sorted(x.step_seconds for x in found)


def run(capsys, *arguments):
    code = cli.main(["plan", "demo", "--set", "run.dtype=bfloat16", *arguments])
    shown = capsys.readouterr()
    return code, shown.out, shown.err


def test_the_command_says_what_limits_and_what_fits(capsys, tmp_path):
    code, out, _ = run(capsys, "--gpus", "2", "--json", str(tmp_path / "x.json"))
    assert code == 0 and "2 x H100 80GB = 1 data x 2 context" in out and "limited by: " in out and "MFU" in out
    assert "note: a step this short takes longer" in out
    figures = json.loads((tmp_path / "x.json").read_text())
    assert figures["fits"] and figures["step_seconds"] > 0 and figures["longest"] > 2048
    large = ["--set", "model.n_layers=32", "--set", "model.hidden_size=4096", "--set", "model.n_heads=32"]
    large += ["--set", "model.n_kv_heads=8", "--set", "data.seq_len=4194304", "--set", "data.sequences_per_step=1"]
    code, out, _ = run(capsys, "--gpus", "4", *large)
    assert code == WRONG and "memory: does not fit into 79 GiB" in out and "fits: " in out
    assert "note: a step" not in out
    code, out, _ = run(capsys, "--gpus", "1", "--gpu", "A100")
    assert code == 0 and "not measured on A100" in out


def test_what_a_run_would_refuse_is_not_proposed(capsys):
    """Heads among four ranks: of eight, neither one nor two share a sequence; among all of 64 they are too few."""
    options = "--set", "model.hidden_size=256", "--set", "model.n_heads=4", "--set", "data.sequences_per_step=8"
    made = load(TrainConfig, "demo", [*options[1::2], "exchange.head_ranks=4", "run.context_size=4"])
    assert {x.context for x in candidates(made, 8, GPUS["h100"], 8, None)} == {4, 8}
    made = load(TrainConfig, "demo", [*options[1::2], "exchange.mode=heads", "run.context_size=4"])
    assert longest(made, 4, GPUS["h100"]) > 0 and longest(made, 64, GPUS["h100"]) == 0
    code, out, _ = run(capsys, "--gpus", "8", *options, "--set", "exchange.mode=heads", "--set", "run.context_size=4")
    assert code == 0 and "no length fits that all share" in out


def test_what_would_fit_has_the_host_memory_that_was_named():
    asked, gpu = config(3 << 20), GPUS["h100"]
    for host_gib, gpus in ((None, 4), (1.0, 8)):
        made = forecast(asked, 1, gpu, 8, host_gib)
        assert made.memory is None and _lines(made, [], 0, gpu, 8, host_gib)[-2] == f"fits: --gpus {gpus}"
    # A length is proposed only where it is shorter, and where few may share a sequence, more.
    alone = forecast(config(3 << 20, context_size=1), 1, gpu)
    assert _lines(alone, [], 4 << 20, gpu)[-2] == "fits: --gpus 4 --set run.context_size=null"
    apart = config(3 << 20, context_size=1)
    apart = replace(apart, data=replace(apart.data, gradient_accumulation=2))
    assert _lines(forecast(apart, 2, gpu), [], 0, gpu)[-2] == "fits: --gpus 4 --set run.context_size=null"


def a_run(folder, monkeypatch, made: TrainConfig, device: str, seconds: list[float], gib: float | None, layers=None,
          gathered=False):  # fmt: skip
    """A folder as a run on ``device`` leaves it, whose steps took ``seconds`` and ``gib``."""
    kept = MemoryPlan(tuple(layers or [LayerMemory()] * made.model.n_layers), {}, 0, gathered)
    plan = SimpleNamespace(config=replace(made, run=replace(made.run, directory=str(folder))), size=1, context_size=1)
    monkeypatch.setattr("moba_cp.train.report._device_name", lambda _: device)
    monkeypatch.setattr("moba_cp.train.report.draw", lambda *_: None)
    with Reporter(plan, SimpleNamespace(first=True, device=None), 0, None, kept) as reporter:
        reporter.start(5.0)
        for step, taken in enumerate(seconds, 1):
            record = {"step": step, "loss": 5.0, "attention": "moba", "tokens_per_second": 1.0}
            record |= {"seconds": taken, "exchange": {"sent_bytes": 0}, **({} if gib is None else {"peak_gib": gib})}
            reporter.report(record)
    return str(folder)


def test_gathered_weights_are_in_a_run_s_forecast(tmp_path, monkeypatch):
    made = config(32768, "none")
    for name, gathered in (("with", True), ("without", False)):
        a_run(tmp_path / name, monkeypatch, made, "NVIDIA H200", [9, 0.31, 0.31], 26.4, gathered=gathered)
    more = measured.compare(tmp_path / "with").predicted_gib - measured.compare(tmp_path / "without").predicted_gib
    assert more == pytest.approx(2 * 12 / 14 * made.model.n_parameters() / 2**30)


def test_runs_are_held_against_their_forecasts(tmp_path, monkeypatch, capsys):
    h100, layers = "NVIDIA H100 80GB HBM3", [LayerMemory("full")] * 14
    # The first step, which compiles, does not count, nor does one that is traced.
    long = a_run(tmp_path / "long", monkeypatch, config(recompute="full"), h100, [9, 1.6, 1.69, 1.8], 18.5, layers)
    traced = config(32768, trace_step=3)
    short = a_run(tmp_path / "short", monkeypatch, traced, h100, [9, 0.33, 70, 0.33], None)
    capsys.readouterr()
    assert cli.main(["plan", "--measured", long, short, "--json", str(tmp_path / "x.json")]) == 0
    assert cli.main(["plan", "--measured", long, short, "--chart", str(tmp_path / "x.png")]) == 0
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
    out = capsys.readouterr().out
    first, second = json.loads((tmp_path / "x.json").read_text())
    assert (first["seconds"], first["steps"], second["seconds"], second["steps"]) == (1.69, 3, 0.33, 2)
    expected = forecast(config(recompute="full"), 1, GPUS["h100"]).step_seconds
    assert first["predicted_seconds"] == pytest.approx(expected) and first["layers"] == "14 x full"
    assert first["memory_ratio"] == pytest.approx(1, abs=0.05) and second["memory_ratio"] is None
    assert "| long | 1 x H100 80GB HBM3 |" in out and f"{100 * (expected / 1.69 - 1):+.1f} %" in out
    low, high = sorted([first["time_ratio"], second["time_ratio"]])
    assert f"time: {low:.3f}, {(low + high) / 2:.3f}, {high:.3f} (minimum, median and maximum of 2)" in out
    assert "memory: " in out and "of 1)" in out

    cpu = a_run(tmp_path / "cpu", monkeypatch, config(), "cpu", [1.0] * 5, None)
    brief = a_run(tmp_path / "brief", monkeypatch, config(), h100, [1.0], None)
    for arguments, message in (
        ([cpu], "ran on 'cpu'; forecasts are for h100, h200"),
        ([brief], "brief: fewer than 2 steps"),
        ([str(tmp_path)], "no config.yaml there"),
        ([long, "--gpus", "2"], "--measured with CONFIG, --gpus or --set"),
    ):
        capsys.readouterr()
        assert cli.main(["plan", "--measured", *arguments]) == 2
        shown = capsys.readouterr().err
        assert message in shown and shown.count("\n") == 1


def test_the_chart_joins_what_was_run_alike(monkeypatch, tmp_path):
    """Runs that recompute otherwise are no points of one line; full attention goes on to its model's longest."""
    pytest.importorskip("matplotlib")
    row = measured.Comparison(
        "", "NVIDIA H200", 1, 1, 542 * 10**6, 1024, 1, "", "MoBA", "auto", "", 2, 1.0, 1.0, 10.0, 10.0
    )
    full = replace(row, kind="full attention", attention="all")
    rows = [replace(row, seq_len=n, seconds=n / 1024) for n in (4096, 1024, 2048)]
    rows.append(replace(row, seq_len=2048, seconds=3.0, recompute="full", gib=None))
    rows += [replace(full, seconds=2.0), replace(full, seq_len=2048, seconds=8.0)]
    rows.append(replace(row, parameters=596 * 10**6, ranks=4, seq_len=16384))
    drawn = []
    monkeypatch.setattr(measured, "save_picture", lambda figure, *_: drawn.append(figure))
    measured.draw(rows, tmp_path / "x.png")
    time, memory = drawn[0].axes
    lines = {line.get_label(): [list(map(float, xs)) for xs in line.get_data()] for line in time.lines}
    assert lines["542.0 M: MoBA, 1 x H200"] == [[1024, 2048, 4096], [1, 2, 4]]
    assert lines["542.0 M: MoBA, 1 x H200, recompute: full"] == [[2048], [3]]
    assert lines["596.0 M: MoBA, 4 x H200"] == [[16384], [1]]
    tokens, seconds = lines["the same, computed: a T + b T\u00b2"]
    assert tokens[-1] == pytest.approx(4096) and seconds[-1] == pytest.approx(32.0), "2 (T / 1024)^2"
    assert len(memory.lines) == 3, "of the fourth no memory is known"


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--gpus", "0"], "--gpus=0 is below 1"),
        ([], "plan needs CONFIG and --gpus N, or --measured RUN"),
        (["--gpus", "2", "--gpus-per-node", "0"], "--gpus-per-node=0 is below 1"),
        (["--gpus", "2", "--gpu", "tpu"], "--gpu=tpu: not known; use one of h100, h200"),
        (["--gpus", "2", "--set", "run.context_size=3"], "run.context_size=3 does not divide the 2 ranks"),
        (["--gpus", "2", "--host-gib", "0"], "--host-gib=0 is not above 0"),
        (["--gpus", "2", "--json", "nowhere/x.json"], "nowhere/x.json': there is no folder"),
        (["--gpus", "3"], "data.seq_len=2048 is not divisible by 2 * cp_size = 6"),
        (["--gpus", "4", "--set", "exchange.mode=heads"], "4 ranks are to exchange tokens for heads"),
        (["--gpus", "4", "--set", "exchange.ranks_per_node=3"], "exchange.ranks_per_node=3 does not divide the 4"),
        (["--gpus", "1", "--set", "attention.index={dim: 48}"], "attention.index.dim=48 does not divide head_dim=64"),
        (
            ["--gpus", "4", "--set", "run.context_size=1", "--set", "data.sequences_per_step=3"],
            "not divisible by the 4",
        ),
    ],
)
def test_mistakes_get_one_line(capsys, arguments, message):
    code, _, err = run(capsys, *arguments)
    assert code == 2 and message in err and err.count("\n") == 1
