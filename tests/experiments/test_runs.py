"""What the experiments train, at every scale."""

from dataclasses import replace
from pathlib import Path

import pytest

from moba_cp.experiments import grid, grid_command, start
from moba_cp.experiments.grid import DAY, flops
from moba_cp.experiments.runs import GRIDS, Maker
from moba_cp.experiments.scales import SCALES, scale_called
from moba_cp.experiments.start import cost, in_order


@pytest.fixture(params=SCALES)
def maker(request, tmp_path):
    scale = scale_called(request.param)
    return Maker(scale, tmp_path, scale.base)


def test_options_name_all_there_is():
    assert set(grid_command.NAMES) == set(GRIDS) and grid_command.SCALES == SCALES


def test_moba_and_full_attention_differ_in_attention_alone(maker):
    for name in ("scaling-law", "position-loss", "training-hybrid"):
        runs = list(GRIDS[name](maker))
        by_place = {}
        for run in runs:
            by_place.setdefault((run.facts["size"], run.facts["seed"]), []).append(run)
        for alike in by_place.values():
            assert {run.facts["kind"] for run in alike} >= {"moba", "full"}
            kinds = {run.config.attention.at(1, 100).default for run in alike}
            assert kinds == {"moba", "full"}
            for run in alike:
                assert (run.config.model, run.config.data) == (alike[0].config.model, alike[0].config.data)
                assert run.config.optimizer == alike[0].config.optimizer
                assert run.config.run.seed == alike[0].config.run.seed and run.tokens == alike[0].tokens


def test_five_sizes_span_a_factor_of_16():
    sizes = scale_called("small").sizes
    assert len(sizes) >= 5 and sizes[-1].n_parameters >= 16 * sizes[0].n_parameters


def test_the_paper_has_its_sizes(tmp_path):
    scale = scale_called("paper")
    published = [(545e6, 14, 1792, 10.8e9), (822e6, 16, 2048, 15.3e9), (1.1e9, 18, 2304, 20.6e9)]
    published += [(1.5e9, 20, 2560, 27.4e9), (2.1e9, 22, 2816, 36.9e9)]
    for size, (parameters, layers, hidden, tokens) in zip(scale.sizes, published, strict=True):
        assert (size.n_layers, size.n_heads, size.hidden_size) == (layers, layers, hidden)
        assert size.n_parameters == pytest.approx(parameters, rel=0.06) and size.tokens == tokens
    runs = list(GRIDS["scaling-law"](Maker(scale, tmp_path, scale.base)))
    assert min(map(flops, runs)) / DAY == pytest.approx(0.41, rel=0.05)
    (switch,) = (run for run in GRIDS["training-hybrid"](Maker(scale, tmp_path, scale.base)) if "switch" in run.name)
    assert switch.tokens == pytest.approx(30e9, rel=1e-3) and switch.config.attention.block_size == 2048


def test_granularity_has_one_sparsity(maker):
    runs = [run for run in GRIDS["granularity"](maker) if run.facts["kind"] == "moba"]
    shares = {run.facts["top_k"] * run.facts["block_size"] / run.length for run in runs}
    assert len(shares) == 1 and len({run.name for run in runs}) == len(runs) >= 3


def test_fine_tuning_begins_with_the_model_trained_with_moba(maker):
    tuned = [run for run in GRIDS["layerwise-hybrid"](maker) if run.facts["seed"] == 0]
    parent = tuned[0].parent
    assert parent.facts["kind"] == "moba"
    n = parent.config.model.n_layers
    assert {run.facts["full_layers"] for run in tuned} >= {0, 1, 3, n}
    for run in tuned:
        assert run.parent is parent and run.config.run.start_from == parent.config.run.directory
        full = run.config.attention.full_layer_numbers(n)
        assert full == set(range(n - run.facts["full_layers"] + 1, n + 1))
        if not maker.scale.own_data:
            assert Path(run.config.data.path).name == "tuning"


def test_long_documents_come_after_short_ones(maker):
    """Where the scale says so, those of MoBA after MoBA's, and blocks that cover all of a short one after full's."""
    scale = maker.scale
    for name in ("position-loss", "granularity", "training-hybrid"):
        for run in GRIDS[name](maker):
            if scale.extension is None:
                assert run.parent is None
                continue
            before, facts = run.parent, run.facts
            assert run.lineage[-2:] == (before, run) and before.length == scale.length < run.length == scale.long
            assert run.config.run.start_from == before.config.run.directory
            own = facts["block_size"] in (scale.block_size, scale.switch_block_size) and facts["top_k"] == scale.top_k
            assert before.facts["kind"] == ("moba" if own and facts["kind"] != "full" else "full")
            if own and before.facts["kind"] == "moba":
                assert before.config.attention.moba == run.config.attention.moba
            if name == "granularity" and not own:
                assert facts["block_size"] * facts["top_k"] >= scale.length
            assert run.tokens == pytest.approx((1 + scale.extension) * before.tokens, rel=0.15)
            assert flops(run) == 6 * run.n_parameters * run.tokens
            if facts["kind"] == "switch":
                steps, until = run.config.run.steps, run.config.attention.schedule[0].until
                fully = (steps - int(until * steps + 0.5)) * (run.tokens - before.tokens) / steps
                assert fully == pytest.approx(0.1 * run.tokens, rel=0.4 if scale.name == "tiny" else 0.01)


def test_what_attends_alike_is_trained_once(maker):
    """Before documents of ``length`` come those of at most ``top_k`` blocks, by one run for MoBA and full attention."""
    scale, firsts = maker.scale, {}
    for name in ("scaling-law", "sliding-window", "key-conv", "training-hybrid", "retrieval"):
        for run in GRIDS[name](maker):
            first = run.lineage[0]
            if (scale.shared_length if not run.finds_keys else scale.retrieval_first or None) is None:
                assert first.facts["kind"] != "shared"
                continue
            assert (first.facts["kind"], first.parent) == ("shared", None)
            attention = run.config.attention
            assert first.length <= (attention.block_size or 512) * (attention.top_k or 3)
            alike = (run.facts["size"], run.facts["seed"], attention.key_conv, run.finds_keys)
            of_size = firsts.setdefault(alike, first)
            assert first.config == of_size.config and first.config.attention.key_conv == attention.key_conv
            second = run.lineage[1]
            share = scale.retrieval_share if run.finds_keys else scale.shared_share
            assert first.tokens == pytest.approx(share * second.tokens, rel=0.01)
            assert second.config.run.start_from == first.config.run.directory


def test_keys_are_found_in_short_documents_first(maker):
    for run in GRIDS["retrieval"](maker):
        lengths = [stage for stage in (maker.scale.retrieval_first, maker.scale.retrieval_lengths) if stage]
        assert [each.length for each in run.lineage] == [stage[-1] for stage in lengths]
        assert run.tokens == pytest.approx(maker.scale.retrieval_size.tokens, rel=0.01)
        for each, stage in zip(run.lineage, lengths):
            assert sum(stage) * start._RETRIEVAL_HELD_OUT >= each.config.data.seq_len or maker.scale.own_data
            assert each.finds_keys
            assert each.config.model.vocab_size == 256 and bool(each.tests) == (each is run)


def test_the_vocabulary_is_that_of_the_text():
    for name in SCALES:
        scale = scale_called(name)
        if not scale.own_data:
            assert scale.base.model.vocab_size == (scale.vocabulary or 256)


def test_a_window_has_as_many_blocks_as_moba_and_chooses_none(maker):
    runs = [run for run in GRIDS["sliding-window"](maker) if run.facts["kind"] != "full"]
    assert {bool(run.tests) for run in runs} == {True, False}
    for moba, window in ((a, b) for a in runs for b in runs if a.facts["kind"] == "moba" != b.facts["kind"]):
        if moba.tests != window.tests or moba.facts["seed"] != window.facts["seed"]:
            continue
        of_moba, of_window = moba.config.attention.moba, window.config.attention.moba
        assert (of_moba.block_size, of_moba.top_k) == (of_window.block_size, of_window.top_k)
        assert of_window.sink and of_window.min_recent == of_window.top_k - 2 and not of_moba.sink


def test_convolved_keys_are_all_that_differs(maker):
    own, widths = maker.base.attention.key_conv, set()
    for run in GRIDS["key-conv"](maker):
        attention, kind = run.config.attention, run.facts["kind"]
        assert attention.key_conv == {"conv0": 0, "conv3": 3, "conv5": 5}.get(kind, own)
        widths.add(attention.key_conv)
        if kind.startswith("conv"):
            alike = next(x for x in GRIDS["key-conv"](maker) if x.name == run.name.replace(kind, "moba"))
            assert replace(attention, key_conv=own) == alike.config.attention and run.config.data == alike.config.data
            assert run.parent is None or run.parent.config.attention.key_conv == attention.key_conv
    assert widths == {0, 3, 5}


def test_a_name_is_one_config(maker):
    seen = {}
    for make in GRIDS.values():
        for run in (each for last in make(maker) for each in last.lineage):
            known = seen.setdefault(run.name, run)
            assert grid.identity(run.config) == grid.identity(known.config)
    runs = in_order({name: list(make(maker)) for name, make in GRIDS.items()})
    assert {run.name for run in runs} == set(seen)
    seeds = [run.facts["seed"] for run in runs]
    assert 0 not in seeds[seeds.count(0) :], "every chart has its first seed before any has its second"
    for i, run in enumerate(runs):
        assert run.parent is None or run.parent.name in {each.name for each in runs[:i]}


def test_cost_says_what_is_to_do(maker):
    runs = list(GRIDS["granularity"](maker))
    lines = cost(runs, 2)
    assert len(lines) == len(runs) + 2 and f"{len(runs)} of {len(runs)} runs to do" in lines[-1]


def test_options_out_of_range_are_refused(capsys):
    from moba_cp.cli import main

    assert main(["experiment", "granularity", "--gpus", "0"]) == 2
    assert "--gpus=0 is not above 0" in capsys.readouterr().err
