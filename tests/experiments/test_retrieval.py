"""Documents to retrieve from: what is asked stands where it is said to, once."""

import numpy as np
import pytest

from moba_cp.data.config import DataConfig
from moba_cp.data.corpus import open_corpora
from moba_cp.data.packing import Packer
from moba_cp.experiments import retrieval
from moba_cp.experiments.retrieval import KEYS, VALUES, build_retrieval, make_document, make_recall
from moba_cp.model.loss import IGNORED_LABEL


@pytest.mark.parametrize(("pairs", "asked"), [(1, 1), (32, 1), (16, 16), (52, 52)])
def test_a_document_holds_what_it_asks(pairs, asked):
    generator = np.random.default_rng(0)
    for _ in range(20):
        document = make_document(generator, 1024, pairs, asked)
        tokens, text = document.tokens, document.tokens[: 1024 - 2 * asked]
        places = np.flatnonzero(np.isin(text, list(KEYS)))
        assert len(places) == pairs == len(set(text[places]))
        values = dict(zip(text[places], text[places + 1]))
        assert set(values.values()) <= set(VALUES)
        assert len(document.answers) == asked
        assert [values[tokens[at - 1]] for at in document.answers] == list(tokens[document.answers])


@pytest.mark.parametrize(("pairs", "filled"), [(1, 0.1), (8, 0.5), (52, 1.0)])
def test_a_key_is_asked_whenever_it_comes_again(pairs, filled):
    generator = np.random.default_rng(0)
    for _ in range(20):
        document = make_recall(generator, 256, pairs, filled)
        places = np.flatnonzero(np.isin(document.tokens, list(KEYS)))
        assert len(places) == int(filled * 128) and not (places % 2).any()
        values: dict = {}
        for place in places:
            key, value = document.tokens[place : place + 2]
            assert values.setdefault(key, value) == value and value in VALUES
        assert len(values) <= pairs and len(document.answers) == len(places) - len(values)
        firsts = {int(np.flatnonzero(document.tokens == key)[0]) for key in values}
        assert not firsts & set(document.answers - 1) and set(document.answers - 1) | firsts == set(places)


def test_the_asked_key_stands_at_its_depth():
    generator = np.random.default_rng(0)
    for part in range(8):
        for _ in range(20):
            document = make_document(generator, 512, 32, 1, (part / 8, (part + 1) / 8))
            (place,) = np.flatnonzero(document.tokens[:510] == document.tokens[document.answers[0] - 1])
            assert part / 8 - 0.01 <= place / 510 <= (part + 1) / 8 + 0.01


@pytest.mark.parametrize("sparse", [False, True])
def test_only_asked_values_have_labels_when_trained_on(sparse, tmp_path):
    build_retrieval(tmp_path, (256, 512), 2**15, 4, sparse)
    config = DataConfig(path=str(tmp_path / "training"), seq_len=1024, packing="best_fit", validation_share=0.1)
    documents = open_corpora(config).parts[0].training
    assert set(documents.lengths) == {256, 512}
    tokens, labels = Packer(documents, 1024, 0, "best_fit").sequence(0).read()
    at = np.flatnonzero(labels.numpy() != IGNORED_LABEL)
    assert len(at) and set(labels.numpy()[at]) <= set(VALUES)
    assert set(tokens.numpy()[at]) <= set(KEYS)
    before = (tmp_path / "training.bin").stat().st_mtime_ns
    build_retrieval(tmp_path, (256, 512), 2**15, 4, sparse)
    assert (tmp_path / "training.bin").stat().st_mtime_ns == before


@pytest.mark.parametrize("knows", [True, False])
def test_answers_are_judged_at_the_asked_keys(knows, tmp_path, monkeypatch):
    """A model that knows the values of all keys is right everywhere, and one that knows none nowhere."""
    import torch

    from moba_cp.experiments.runs import Maker
    from moba_cp.experiments.scales import scale_called
    from moba_cp.train.mesh import close_mesh

    scale = scale_called("tiny")
    run = Maker(scale, tmp_path, scale.base).retrieving("moba", 0)
    (tmp_path / "runs" / run.name).mkdir(parents=True)

    class Model(torch.nn.Module):
        def forward(self, tokens, labels, context):
            following = torch.roll(tokens, -1) if knows else torch.zeros_like(tokens)
            return torch.nn.functional.one_hot(following, 256).float()

    monkeypatch.setattr(retrieval, "model_with", lambda *args: Model())
    try:
        found = retrieval.answer(run.config, run.tests["retrieval"])
    finally:
        close_mesh()
    assert set(found["pass-key"]) == {"256", "512", "1024"}
    shares = [share for task in ("pass-key", "multi-key") for row in found[task].values() for share in row]
    assert {*shares, *found["recall"].values()} == {float(knows)} and len(shares) == 48
