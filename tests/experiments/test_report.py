"""Charts, tables and words of experiments, from summaries whose losses follow a known law."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from matplotlib import pyplot

from moba_cp.experiments import grid, report, retrieval_report, training_report
from moba_cp.experiments.mass import TOP_K, block_sizes
from moba_cp.experiments.runs import GRIDS, RANGES, Maker
from moba_cp.experiments.scales import scale_called


@pytest.fixture
def maker(tmp_path):
    scale = replace(scale_called("small"), seeds=2)
    return Maker(scale, tmp_path, scale.base)


def write_summary(run, corpus="text"):
    """MoBA's loss is 1 % above full attention's everywhere, later positions are easier, fine blocks are better."""
    compute, facts = grid.flops(run) / grid.DAY, run.facts
    loss = 2.0 * compute**-0.1 * (1.01 if facts["kind"] != "full" else 1.0) * (1 + 0.001 * facts["seed"])
    loss += 1e-6 * facts.get("block_size", 0) * (facts["kind"] == "moba") - 0.01 * facts.get("full_layers", 0)
    width = run.length // RANGES
    positions = [{"from": i * width, "to": (i + 1) * width - 1, "loss": loss - 0.01 * i, "labels": 9}
                 for i in range(RANGES)]  # fmt: skip
    folder = Path(run.config.run.directory)
    folder.mkdir(parents=True)
    found = {
        "name": run.name, "facts": facts, "length": run.length, "parameters": run.n_parameters, "tokens": run.tokens,
        "pflops_days": compute, "validation_loss": loss, "by_position": positions, "training_loss": loss,
        "seconds": 36.0, "corpus": corpus, "config": grid.identity(run.config),
    }  # fmt: skip
    if "retrieval" in run.tests:
        lengths = map(str, run.tests["retrieval"])
        cells = {length: [0.25 + 0.5 * (facts["kind"] == "full")] * 8 for length in lengths}
        found["retrieval"] = {"pass-key": cells, "multi-key": cells, "recall": {"4": 1.0, "64": 0.5}}
    if "mass" in run.tests:
        found["mass"] = {str(b): {str(k): 0.01 * k for k in TOP_K} for b in block_sizes(run.length)}
    (folder / "summary.json").write_text(json.dumps(found))
    steps = range(1, 41)
    records = [{"step": s, "loss": loss + 0.5 * (facts["kind"] == "switch" and s == 37)} for s in steps]
    (folder / "log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


def test_blocks_are_counted_by_what_moba_attends_to(maker, tmp_path):
    """Also where full attention, whose run says the scale's own blocks, was trained last."""
    runs = list(GRIDS["block-size"](maker))
    for run in runs[: len(runs) // 2 + 1]:
        write_summary(run)
    facts = runs[len(runs) // 2].facts
    assert facts["kind"] == "full" and facts["block_size"] * facts["top_k"] != maker.scale.long // 8
    said = report.write("block-size", runs, tmp_path)
    assert any(line.startswith("| 4,096 | 1 |") for line in said)


@pytest.mark.parametrize("name", list(GRIDS))
def test_every_experiment_has_chart_table_and_page(name, maker, tmp_path):
    runs = list(GRIDS[name](maker))
    for run in runs:
        write_summary(run)
    said = report.write(name, runs, tmp_path)
    assert f"{len(runs)} of {len(runs)} runs" in said[0]
    assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert len((tmp_path / f"{name}.csv").read_text().splitlines()) == len(runs) + 1
    page = (tmp_path / f"{name}.md").read_text()
    expected = {
        "scaling-law": [
            "MoBA's fitted line lies +1.0",
            "| full attention | 2.00",
            "2.625 * C^-0.063",
            "| at a quarter of the steps |",
            " | +1.0 %" * 6 + " |",
        ],
        "position-loss": ["| 0 to 2,048 |", "30,720 to 32,768", "1.546 * C^-0.108"],
        "granularity": ["| 2/8 | 4,096 |", "| 32/128 | 256 |", "| +1.07 % (± 0.00) |", "2 seeds; ±"],
        "training-hybrid": ["at most +0.4980 nats above"],
        "layerwise-hybrid": ["| 0 of 6 |", "| 3 of 6 |", "| 6 of 6 |"],
        "retrieval": ["| full attention | 75 % | 75 % |", "| MoBA | 25 % |"],
        "sliding-window": ["| window and sink | ", "| first range | last range | a key, 512 |", "| 25 % | 25 % |"],
        "key-conv": [
            "| MoBA, keys not convolved | ",
            "| MoBA, keys convolved by 5 | ",
            "keys are convolved over 3 tokens, of MoBA and full attention alike",
        ],
        "block-size": ["| 4,096 | 1 |", "| 64 | 64 |", "64.0 %"],
    }[name]
    for words in expected:
        assert words in page, page


@pytest.mark.parametrize("name", ["granularity", "block-size", "training-hybrid", "position-loss"])
def test_runs_are_compared_with_those_of_their_seed(name, maker, tmp_path):
    """Runs of a second seed that is not done change nothing that is said of the first."""
    runs = list(GRIDS[name](maker))
    first, second = ([run for run in runs if run.facts["seed"] == seed] for seed in (0, 1))
    for run in first:
        write_summary(run)
    alone = report.write(name, first, tmp_path)
    write_summary(next(run for run in second if run.facts["kind"] == "full"))
    beside = report.write(name, runs, tmp_path)
    assert beside[1:] == alone[1:] and f"{len(first) + 1} of {len(runs)} runs" in beside[0]
    assert "Left out: 1 of them" in (tmp_path / f"{name}.md").read_text()


@pytest.mark.parametrize("name", list(GRIDS))
def test_whatever_is_done_it_can_be_drawn(name, maker, tmp_path, monkeypatch):
    """A grid that was stopped anywhere has a chart, or says what is missing."""
    for module in (report, retrieval_report, training_report):
        monkeypatch.setattr(module, "finish", lambda drawn, picture: pyplot.close(drawn))
    runs = [run for run in GRIDS[name](maker) if run.facts["seed"] == 0]
    assert "nothing is done yet" in report.write(name, runs, tmp_path)[0]
    for i, run in enumerate(runs):
        write_summary(run)
        assert f"{i + 1} of {len(runs)} runs" in report.write(name, runs, tmp_path)[0]


def test_runs_that_guess_are_pointed_out(maker, tmp_path):
    """Also those that others begin with, and those that have no summary yet."""
    runs = [run for run in GRIDS["retrieval"](maker) if run.facts["seed"] == 0]
    shared, guessing, learns_late, learned = runs[0].lineage[0], *runs
    for run in runs:
        write_summary(run)
    Path(shared.config.run.directory).mkdir(parents=True)
    for run, late, end in ((shared, 2.3, 2.3), (guessing, 2.29, 2.31), (learns_late, 2.28, 0.1), (learned, 1.5, 0.1)):
        half, log = run.config.run.steps // 2, Path(run.config.run.directory) / "log.jsonl"
        losses = [late] * half + [end] * (half // 2 if run is shared else half)
        log.write_text("".join(json.dumps({"step": i + 1, "loss": loss}) + "\n" for i, loss in enumerate(losses)))
    report.write("retrieval", runs, tmp_path)
    page = (tmp_path / "retrieval.md").read_text()
    assert page.count("had learned nothing after half of its steps") == 3
    for run in (shared, guessing, learns_late):
        assert f"**{run.name} had learned nothing after half of its steps**" in page
    assert "who guesses a value has 2.303; 0.100 in the end" in page


def test_runs_on_other_text_are_pointed_out(maker, tmp_path):
    runs = list(GRIDS["granularity"](maker))
    for i, run in enumerate(runs):
        write_summary(run, corpus="one" if i else "another")
    report.write("granularity", runs, tmp_path)
    assert "**Not all runs have seen the same text.**" in (tmp_path / "granularity.md").read_text()
