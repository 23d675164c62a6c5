"""What a run reads: text or tokens, one corpus or several, checked before anything starts."""

import json
import os
from dataclasses import replace

import numpy as np
import pytest

from moba_cp import cli
from moba_cp.data.build import BuildOptions, build
from moba_cp.data.config import CorpusConfig, DataConfig
from moba_cp.data.corpus import TokenDocuments, open_corpora
from moba_cp.model.config import ModelConfig
from moba_cp.model.loss import IGNORED_LABEL
from moba_cp.train.config import TrainConfig
from moba_cp.train.plan import plan_run
from tests.helpers.data_files import TEXTS, write_jsonl, write_tokenizer


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """PREFIX a (200 documents), b (60, with a mask) and one (a single document) of one tokenizer; a folder of text."""
    base = tmp_path_factory.mktemp("corpora")
    tokenizer = str(write_tokenizer(base / "tokenizer"))
    write_jsonl(base / "a.jsonl", 200)
    write_jsonl(base / "b.jsonl", 60, learn=[[0, 4]])
    (base / "one.jsonl").write_text(json.dumps({"text": TEXTS[1] * 200}) + "\n")
    for name, field in (("a", None), ("b", "learn"), ("one", None)):
        build(BuildOptions((str(base / f"{name}.jsonl"),), str(base / name), tokenizer, mask_field=field), 1)
    (base / "text").mkdir()
    (base / "text" / "x.txt").write_text(TEXTS[1] * 100)
    return base


def run_plan(place, size=1, vocab_size=400, **data):
    data = {"seq_len": 64, "validation_share": 0.1, **data}
    return plan_run(TrainConfig(model=ModelConfig(vocab_size=vocab_size), data=DataConfig(**data)), size)


@pytest.mark.parametrize("suffix", ["", ".bin", ".idx"])
def test_tokens_are_read_by_any_of_their_names(place, suffix):
    plan = run_plan(place, path=f"{place / 'a'}{suffix}")
    (part,) = plan.corpus.parts
    assert part.unit == "tokens" and len(part.training.lengths) + len(part.validation.lengths) == 200
    assert 5 <= len(part.validation.lengths) <= 40
    text = " ".join(plan.summary())
    assert "tokens to train on" in text and "def" in plan.first_text()


def test_held_out_documents_stay_when_others_are_added(place):
    """Whether a document is held out depends on its number and the share alone."""
    plan = open_corpora(DataConfig(path=str(place / "a"), seq_len=64, validation_share=0.1))
    (part,) = plan.parts
    starts = np.sort(np.concatenate([part.training.starts, part.validation.starts]))
    assert starts.tolist() == part.training.files.starts.tolist()
    held_out = set(part.validation.starts.tolist())
    few = open_corpora(DataConfig(path=str(place / "b"), seq_len=64, validation_share=0.1)).parts[0]
    first = [s in held_out for s in part.training.files.starts[:60].tolist()]
    mine = set(few.validation.starts.tolist())
    assert first == [s in mine for s in few.training.files.starts.tolist()] and any(first)


def test_of_a_single_document_the_tail_is_held_out(place):
    (part,) = open_corpora(DataConfig(path=str(place / "one"), seq_len=64, validation_share=0.2)).parts
    whole = part.training.files.read(0, 0, part.training.files.n_tokens)
    joined = [*part.training.read(0, 0, part.n_training), *part.validation.read(0, 0, part.n_validation)]
    assert joined == whole.tolist() and part.n_validation == round(0.2 * len(whole))


def test_a_mask_of_the_build_is_used(place):
    plan = run_plan(place, path=str(place / "b"), validation_share=0.2)
    assert f"loss mask: {place / 'b_mask'}" in plan.summary()
    _, labels = plan.training_sequences.sequence(0).read()
    (part,) = plan.corpus.parts
    assert isinstance(part.training, TokenDocuments) and 0 < (labels != IGNORED_LABEL).sum() < 20
    # The same tokens with a mask of one's own.
    corpus = CorpusConfig(path=str(place / "b"), mask=str(place / "b_mask"))
    named = run_plan(place, corpora=(corpus,), validation_share=0.2)
    assert named.corpus.fingerprint == plan.corpus.fingerprint


def test_several_corpora_by_weight_or_by_size(place):
    paths = [str(place / name) for name in ("a", "b")]
    by_size = run_plan(place, corpora=tuple(CorpusConfig(path) for path in paths))
    sizes = [part.n_training for part in by_size.corpus.parts]
    assert by_size.corpus.weights == pytest.approx([size / sum(sizes) for size in sizes])
    plan = run_plan(place, corpora=tuple(CorpusConfig(path, weight) for path, weight in zip(paths, (3.0, 1.0))))
    assert plan.corpus.weights == (0.75, 0.25) and "data: 75.0 % of " in " ".join(plan.summary())
    assert plan.corpus.fingerprint != by_size.corpus.fingerprint
    assert plan.validation_sequences.per_epoch == sum(p.per_epoch for p in plan.validation_sequences.packers)


def test_validation_may_have_a_path_of_its_own(place):
    plan = run_plan(place, path=str(place / "a"), validation_path=str(place / "one"))
    assert len(plan.corpus.parts[0].training.lengths) == 200
    sequence = plan.validation_sequences.sequence(0)
    assert sequence.documents.files.prefix == place / "one"
    assert f"validation on {place / 'one'}" in " ".join(plan.summary())


@pytest.mark.parametrize("size, context, per_step", [(1, None, 4), (4, 2, 8), (4, 1, 16)])
def test_gradient_accumulation_counts_sequences_of_a_data_rank(place, size, context, per_step):
    config = TrainConfig(model=ModelConfig(vocab_size=400), data=DataConfig(path=str(place / "a"), seq_len=64,
                         gradient_accumulation=4))  # fmt: skip
    plan = plan_run(replace(config, run=replace(config.run, context_size=context)), size)
    assert plan.config.data.sequences_per_step == per_step and plan.tokens_per_step == 64 * per_step


def test_best_fit_reports_its_waste(place):
    plan = run_plan(place, path=str(place / "a"), packing="best_fit", overlap=8)
    line = next(line for line in plan.summary() if line.startswith("packing: best fit, "))
    assert 0 <= float(line.split()[3]) < 20 and "documents longer than seq_len are cut" in line


WRONG = [
    (
        dict(path="a", vocab_size=300),
        "model.vocab_size=300 is below 400: that is the vocabulary of the data's tokenizer",
    ),
    (dict(path="a", seq_len=10**6), "tokens to train on are fewer than one sequence, data.seq_len=1000000"),
    (dict(path="a", pattern="*"), "data.pattern='*'|pattern='*' of "),
    (dict(corpora=(CorpusConfig("a"), CorpusConfig("text"))), "data: bytes and tokens do not mix"),
    (dict(corpora=(CorpusConfig("text", mask="b_mask"),)), "mask='b_mask' of text, which is text"),
    (dict(corpora=(CorpusConfig("a", mask="b_mask"),)), "b_mask: not a mask of a: it must hold one uint8"),
    (dict(path="a", corpora=(CorpusConfig("a"),)), "path='a' beside corpora"),
    (dict(corpora=(CorpusConfig("a", 1.0), CorpusConfig("b"))), "some have a weight and some have none"),
    (dict(path="a", overlap=5), "overlap=5 with packing='stream'; use packing: best_fit"),
    (dict(path="a", overlap=64, packing="best_fit"), "overlap=64 is not between 0 and seq_len=64"),
    (dict(path="a", gradient_accumulation=3, sequences_per_step=2), "ask for different steps; leave one of them out"),
]


@pytest.mark.parametrize("data, message", WRONG, ids=[message[:40] for _, message in WRONG])
def test_what_does_not_fit_is_refused(place, monkeypatch, data, message):
    monkeypatch.chdir(place)
    with pytest.raises(ValueError) as caught:
        run_plan(place, **data)
    assert any(text in str(caught.value) for text in message.split("|")), caught.value


def test_a_truncated_file_is_one_line(place, tmp_path, capsys):
    for suffix in (".bin", ".idx"):
        (tmp_path / f"a{suffix}").write_bytes((place / f"a{suffix}").read_bytes())
    os.truncate(tmp_path / "a.bin", 1000)
    assert cli.main(["train", "demo", "--set", f"data.path={tmp_path / 'a'}", "--dry-run"]) == 2
    shown = capsys.readouterr().err
    assert "a.bin: truncated, 1000 of " in shown and shown.count("\n") == 1


def test_tokens_beyond_the_vocabulary_are_found_when_they_are_read(place, tmp_path):
    """Files of Megatron-LM do not say what their vocabulary is."""
    for suffix in (".bin", ".idx"):
        (tmp_path / f"a{suffix}").write_bytes((place / f"a{suffix}").read_bytes())
    plan = run_plan(place, path=str(tmp_path / "a"), vocab_size=100)
    with pytest.raises(ValueError, match=r"token \d+ is beyond model.vocab_size=100"):
        plan.check_tokens(plan.training_sequences.sequence(0).tokens)


def test_show_prints_what_a_sequence_holds(place, capsys):
    assert cli.main(["data", "show", str(place / "b"), "--sequence", "1", "--seq-len", "64"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("sequence 1 of ") and "labels: " in shown and "def" in shown


def test_every_file_that_is_read_is_named(place):
    """Ranks compare them before the first step."""
    plan = run_plan(place, corpora=(CorpusConfig(str(place / "a")), CorpusConfig(str(place / "b"))), seq_len=32)
    names = {path.name for path in plan.corpus.paths}
    assert names == {"a.bin", "a.idx", "b.bin", "b.idx", "b_mask.bin", "b_mask.idx"}
    text = run_plan(place, path=str(place / "text"), validation_path=str(place / "one.jsonl"))
    assert {path.name for path in text.corpus.paths} == {"x.txt", "one.jsonl"}
