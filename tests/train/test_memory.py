"""What a step takes: predictions against measured runs, which layers keep what, and what is said where nothing fits."""

from dataclasses import replace

import pytest
import torch

from moba_cp.cp.options import ExchangeOptions
from moba_cp.index import IndexConfig
from moba_cp.model import AttentionConfig, ModelConfig
from moba_cp.model.layer import LayerMemory
from moba_cp.train import memory
from moba_cp.train.config import TrainConfig
from moba_cp.train.memory import GIB, MemoryConfig, StepShape, choose_layers, plan_layers
from moba_cp.train.yaml_config import load
from tests.helpers.train_runs import DEMO, SHRUNKEN, logged, train, write_text

MODEL = ModelConfig(n_layers=14, hidden_size=1792, n_heads=14)
MOBA = AttentionConfig(block_size=512, top_k=8)
NONE, KEPT, FULL = (LayerMemory(name) for name in ("none", "attention_kept", "full"))
AWAY = LayerMemory("attention_kept", True)


def shape(n_tokens, **changes):
    return replace(StepShape(MODEL, MOBA, n_tokens, 1, 2), **changes)


@pytest.mark.parametrize(
    "n_tokens, layers, measured",
    [
        (32768, [NONE] * 14, 25.49),
        (131072, [KEPT] * 3 + [NONE] * 11, 68.49),
        (131072, [FULL] * 14, 18.53),
        (1048576, [AWAY] * 12 + [KEPT] * 2, 58.26),
    ],
    ids=["32k none", "131k mixed", "131k full", "1m offloaded"],
)
def test_predictions_meet_what_an_h100_took(n_tokens, layers, measured):
    """``peak_gib`` of the trainer's log, one H100 80GB, bfloat16."""
    assert plan_layers(shape(n_tokens), layers).device / GIB == pytest.approx(measured, rel=0.05)


def test_a_prediction_with_gathered_weights_meets_what_an_h200_took():
    assert plan_layers(shape(32768), [NONE] * 14, gathered=True).device / GIB == pytest.approx(26.42, rel=0.05)


def test_index_branches_take_their_share():
    n, index = 131072, IndexConfig(heads=4, dim=64)
    plain, branch = shape(n), shape(n, attention=replace(MOBA, index=index, full_layers="last 2"))
    parameters = 12 * 14 * (4 * 64 + 64 + 4) * 1792
    assert branch.n_parameters - plain.n_parameters == parameters
    assert branch.state()["moments"] - plain.state()["moments"] == 8 * parameters
    # The gradient of the branch's weights and, of a layer that is computed again, the choice.
    gradient, choice = 14 * (4 * 64 + 64 + 4) * 1792 * 2, n * 14 * 7 * 4
    assert branch.kept(1, "full") - plain.kept(1, "full") == gradient + choice
    assert branch.kept(1, "attention_kept") - plain.kept(1, "attention_kept") == gradient
    assert branch.kept(14, "full") == plain.kept(14, "full")
    assert plan_layers(branch, [FULL] * 14).device > plan_layers(plain, [FULL] * 14).device


def test_index_branches_read_the_keys_of_ranks_that_share_a_sequence():
    """Not of those that have other sequences; by maxima all keys of the scorer too."""
    n, mean = 131072, replace(MOBA, index=IndexConfig(heads=4, dim=64))
    most = replace(mean, index=replace(mean.index, score="max"))
    for attention in (mean, most):
        alone = shape(n, attention=attention)
        assert replace(alone, size=8).forward() == alone.forward()
    # Keys of a head of 4 times as many tokens, twice; of 14 heads of the scorer 16 bits and four times 32.
    by_mean, by_max = (shape(n, attention=x, size=8, context=4)._index_pass for x in (mean, most))
    assert by_mean - shape(n, attention=mean)._index_pass == 4 * n * 2 * 128 * 2
    assert by_max - by_mean == 4 * n * 14 * 64 * (2 + 16)


def test_scratch_is_that_of_the_kernels():
    """The trainer does not import them to say so."""
    work = pytest.importorskip("moba_cp.kernels.work")
    assert (memory._FORWARD_SCRATCH, memory._BACKWARD_SCRATCH) == (work.FORWARD_SCRATCH, work.BACKWARD_SCRATCH)
    assert (memory._WHOLE_HEAD, memory._BACKWARD_VISIT) == (work.WHOLE_HEAD, work.VISIT_BYTES)


@pytest.mark.parametrize(
    "n_tokens, heads, ranks, options",
    [
        (262144, (32, 8), 1, "auto"),
        (1048576, (16, 16), 4, "heads"),
        (1048576, (16, 16), 4, "allgather"),
        (262144, (32, 2), 1, "auto"),
        (2097152, (16, 16), 4, "heads"),
        (4194304, (16, 8), 4, "auto"),
    ],
)
def test_kernels_take_no_more_scratch_than_is_planned(n_tokens, heads, ranks, options):
    """A KV head whose rows are not cut may take more than queries."""
    work = pytest.importorskip("moba_cp.kernels.work")
    (n_heads, n_kv), dim, slots = heads, 128, MOBA.top_k
    model = replace(MODEL, n_heads=n_heads, n_kv_heads=n_kv, head_dim=dim, hidden_size=n_heads * dim)
    planned = shape(n_tokens // ranks, model=model, context=ranks, exchange=ExchangeOptions(options))
    n_rows, n_here = (n_tokens, n_kv // ranks) if options == "heads" else (n_tokens // ranks, n_kv)
    group, rows = n_heads // n_kv, planned.n_tokens * n_heads * dim * 2
    for least, visit in ((work.FORWARD_SCRATCH, memory._FORWARD_VISIT), (work.BACKWARD_SCRATCH, work.VISIT_BYTES)):
        row_bytes = slots * (2 * dim + visit)
        row_step, kv_step = work._steps(n_rows, group, n_here, slots, row_bytes, 0, max(least, rows))
        assert min(row_step, n_rows) * kv_step * group * row_bytes <= planned._scratch(least, visit)


def test_the_plan_that_redoes_least_is_taken():
    there = 79 * GIB, 100 * GIB
    for n_tokens, first, last in ((16384, NONE, NONE), (131072, AWAY, NONE), (1048576, AWAY, KEPT)):
        plan = choose_layers(shape(n_tokens), "auto", "auto", *there)
        assert (plan.layers[0], plan.layers[-1].to_host) == (first, False), n_tokens
        assert plan.layers[-1].recompute in (last.recompute, "none")
        assert plan.device <= there[0] and plan.host <= there[1]
    # Less and less room: never less recomputation, and in the end nothing.
    order, previous = ["none", "attention_kept", "full"], 0
    for device in (79, 60, 40, 20, 16, 10):
        plan = choose_layers(shape(131072), "auto", "auto", device * GIB, 20 * GIB)
        if plan is None:
            break
        redone = sum(order.index(layer.recompute) for layer in plan.layers)
        assert redone >= previous
        previous = redone
    assert plan is None and previous >= 14


def test_weights_stay_gathered_where_memory_is_plenty():
    made = shape(16384)
    once, twice = (plan_layers(made, [NONE] * 14, gathered) for gathered in (True, False))
    layer = MODEL.n_parameters() // MODEL.n_layers
    assert once.device - twice.device == 2 * 12 * layer
    there = lambda plan: (plan.device + 1) / (1 - memory._SLACK)
    assert choose_layers(made, "auto", "auto", there(once), 0) == once
    assert choose_layers(made, "auto", "auto", there(twice), 0) == twice
    assert "weights stay gathered" in once.lines()[0] and "weights stay gathered" not in twice.lines()[0]
    # Not where something is redone, and not where the state is on the host.
    assert not choose_layers(made, "full", "auto", 1e15, 0).gathered
    assert not choose_layers(shape(16384, state_on="host"), "auto", "auto", 1e15, 0).gathered


def test_options_are_obeyed():
    there = 79 * GIB, 100 * GIB
    for recompute in ("none", "attention_kept", "full"):
        plan = choose_layers(shape(16384), recompute, "none", *there)
        assert set(plan.layers) == {LayerMemory(recompute)} and plan.host == 0
        plan = choose_layers(shape(16384), recompute, "all", *there)
        assert set(plan.layers) == {LayerMemory(recompute, True)} and plan.host > 0
    assert choose_layers(shape(1048576), "none", "none", *there) is None
    # The host's memory is a limit too.
    assert choose_layers(shape(1048576), "auto", "auto", there[0], 10 * GIB) is None


def test_less_state_leaves_more_room():
    plain = plan_layers(shape(32768), [NONE] * 14)
    assert plan_layers(shape(32768, moments="bfloat16"), [NONE] * 14).device < plain.device
    assert plan_layers(shape(32768, state_on="host"), [NONE] * 14).device < plain.device - 6 * GIB
    assert plan_layers(shape(32768, size=4), [NONE] * 14).device < plain.device


def config(**changes):
    made = TrainConfig(model=MODEL, attention=MOBA)
    data = replace(made.data, seq_len=1048576)
    return replace(made, data=data, run=replace(made.run, dtype="bfloat16"), **changes)


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"memory": MemoryConfig(offload="none", device_gib=70, host_gib=100)}, "use model.recompute: auto and memory"),
        ({"memory": MemoryConfig(device_gib=45, host_gib=100)}, "; use 2 ranks, or data.seq_len: 524288"),
        ({"memory": MemoryConfig(device_gib=55, host_gib=30)}, "; use 2 ranks, or data.seq_len: 524288"),
    ],
    ids=["offload", "device", "host"],
)
def test_what_does_not_fit_says_what_would(changes, said, monkeypatch):
    monkeypatch.setattr(memory.dist, "all_reduce", lambda *_, **__: None)
    with pytest.raises(ValueError) as error:
        memory.choose(config(**changes), 1, 1048576, torch.device("cpu"), None)
    message = str(error.value)
    assert message.startswith("data.seq_len=1048576 needs ") and said in message, message
    assert "GiB on the device of each rank" in message


def test_ranks_that_would_be_refused_are_not_proposed(monkeypatch):
    """Four, among which 14 heads do not divide; and more ranks share a sequence only where context_size says so."""
    monkeypatch.setattr(memory.dist, "all_reduce", lambda *_, **__: None)

    def said(made):
        with pytest.raises(ValueError) as error:
            memory.choose(made, 1, 1048576, torch.device("cpu"), None)
        return str(error.value)

    tight = MemoryConfig(device_gib=25, host_gib=100)
    assert "; use 4 ranks, or data.seq_len: " in said(config(memory=tight))
    assert "; use data.seq_len: " in said(config(memory=tight, exchange=ExchangeOptions("heads")))
    made = config(memory=MemoryConfig(device_gib=45, host_gib=100))
    made = replace(made, run=replace(made.run, context_size=1))
    assert "; use 2 ranks and run.context_size: 2, or data.seq_len: 524288" in said(made)


def test_on_a_cpu_the_system_knows_better():
    plan = memory.choose(config(), 1, 1048576, torch.device("cpu"), None)
    assert plan.layers == (NONE,) * 14
    plan = memory.choose(config(memory=MemoryConfig(offload="all")), 1, 1048576, torch.device("cpu"), None)
    assert set(plan.layers) == {LayerMemory("none", True)}


@pytest.mark.parametrize("name", ["device_gib", "host_gib"])
def test_limits_are_positive(name):
    with pytest.raises(ValueError, match=f"{name}=0 is not above 0"):
        MemoryConfig(**{name: 0})


OPTIONS = {
    "plain": [],
    "attention kept": ["model.recompute=attention_kept"],
    "attention kept, offloaded": ["model.recompute=attention_kept", "memory.offload=all"],
    "all redone, offloaded": ["model.recompute=full", "memory.offload=all"],
    "state on the host": ["memory.state=host", "memory.offload=all"],
    "some of each": ["memory.device_gib=DEVICE", "memory.host_gib=1"],
}


def test_options_change_no_loss(tmp_path):
    """Two ranks, a full layer among MoBA's, sequences of different documents and lengths; float32."""
    write_text(tmp_path / "text")
    common = [f"data.path={tmp_path / 'text'}", "run.steps=4", "attention.layout=zigzag_per_document"]
    small = load(TrainConfig, DEMO, [*SHRUNKEN, *common])
    tight = StepShape(small.model, small.attention, 128, 2, 4, context=2)
    mixed = plan_layers(tight, [LayerMemory("attention_kept", True), NONE]).device / (1 - memory._SLACK) / GIB
    runs = []
    for name, options in OPTIONS.items():
        options = [option.replace("DEVICE", f"{mixed * 1.0001:.9f}") for option in options]
        runs.append(([*common, f"run.directory={tmp_path / name}", *options], None))
    train(2, *runs)
    for what in ("loss", "gradient_norm"):
        expected = logged(tmp_path / "plain", what)
        assert len(expected) == 4
        for name in OPTIONS:
            assert logged(tmp_path / name, what) == pytest.approx(expected, rel=1e-5), (name, what)


def test_bfloat16_moments_train_alike(tmp_path):
    write_text(tmp_path / "text")
    common, half = [f"data.path={tmp_path / 'text'}"], tmp_path / "narrow" / "checkpoints" / "step-00000010"
    train(
        2,
        ([*common, f"run.directory={tmp_path / 'wide'}"], None),
        ([*common, f"run.directory={tmp_path / 'narrow'}", "optimizer.moments=bfloat16"], None),
        ([*common, f"run.directory={tmp_path / 'back'}", "optimizer.moments=bfloat16"], half),
    )
    wide, narrow, back = (logged(tmp_path / name) for name in ("wide", "narrow", "back"))
    assert narrow == pytest.approx(wide, rel=0.02) and narrow != wide
    # The moments are in the checkpoint as they are kept.
    assert back == {step: loss for step, loss in narrow.items() if step > 10}
