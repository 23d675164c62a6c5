"""Recording selections and drawing them."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from moba_cp import CPContext, MoBAConfig, moba_attention, reference
from moba_cp.bench.gates import RecordedGate
from moba_cp.cp.recorder import SelectionRecorder, draw_heat_maps, heat_map
from tests.helpers.distributed import run_threads


@pytest.mark.parametrize("documents", [[0, 128], [0, 5, 10, 12, 128]], ids=["one document", "short documents"])
def test_a_recorded_selection_is_the_whole_sequence_in_order(tmp_path, documents):
    q, k = torch.randn(128, 4, 8, dtype=torch.float64), torch.randn(128, 2, 8, dtype=torch.float64)
    documents = torch.tensor(documents, dtype=torch.int32)
    path = tmp_path / "gate.pt"

    def forward(comm):
        recorder = SelectionRecorder()
        cp = CPContext(comm, "zigzag", 128, documents, observer=recorder)
        for layer in (3, 11, 2):
            comm.layer = f"layer {layer}"
            moba_attention(*(cp.shard(x) for x in (q, k, k)), MoBAConfig(16, 3), cp=cp)
        recorder.save(path, cp)

    run_threads(2, forward)
    gate = RecordedGate(path)
    assert (gate.layer, gate.block_size, gate.n_kv) == ("layer 3", 16, 2)
    assert RecordedGate(path, 11).layer == "layer 11"
    assert torch.equal(gate.selection.long(), reference.select_blocks(q, k, 16, 3, documents))
    assert gate.bounds.tolist() == documents.tolist()
    with pytest.raises(ValueError, match="gate-layer=1 is not in .*; it has layer 2, layer 3, layer 11"):
        RecordedGate(path, 1)


@pytest.mark.parametrize(
    "names, middle, asked",
    [
        (["layer 1", "layer 10", "layer 2"], "layer 2", {10: "layer 10"}),
        (["decoder.layers.9", "decoder.layers.10", "mtp.layers.0"], "decoder.layers.10", {0: "mtp.layers.0"}),
        (["encoder 2", "decoder 2", "head"], "encoder 2", {2: None, 3: None}),
    ],
)
def test_layers_may_have_any_names(tmp_path, names, middle, asked):
    """The middle one is the default, numbers in names counted as numbers; a number names the one that ends with it."""
    selection = torch.zeros(16, 1, 1, dtype=torch.int32)
    shape = {"block_size": 16, "n_kv_heads": 1, "cu_seqlens": torch.tensor([0, 16])}
    torch.save({"layers": dict.fromkeys(names, selection), **shape}, tmp_path / "gate.pt")
    assert RecordedGate(tmp_path / "gate.pt").layer == middle
    for number, name in asked.items():
        if name is None:
            with pytest.raises(ValueError, match=f"gate-layer={number} is (not|more than one layer) in .*decoder 2"):
                RecordedGate(tmp_path / "gate.pt", number)
        else:
            assert RecordedGate(tmp_path / "gate.pt", number).layer == name


def test_a_shared_selection_is_recorded_and_drawn(tmp_path):
    q, k = torch.randn(128, 4, 8), torch.randn(128, 2, 8)
    recorder = SelectionRecorder()
    cp = CPContext(None, "zigzag", 128, observer=recorder)
    moba_attention(q, k, k, MoBAConfig(16, 3, shared_by_group="max", sink=True), cp=cp)
    recorder.save(tmp_path / "gate.pt", cp)
    assert (tmp_path / "gate.png").stat().st_size > 0
    (selection,) = torch.load(tmp_path / "gate.pt")["layers"].values()
    assert selection.shape == (128, 2, 2)
    counts = heat_map(selection, 8)
    # Each of the 112 tokens behind it, of each group, took the first block.
    assert counts[:, 0].sum() == 2 * 112


def test_heat_map_counts_choices(tmp_path):
    chosen = torch.tensor([[[-1, -1]], [[0, -1]], [[0, 1]], [[1, 2]]], dtype=torch.int32)
    assert heat_map(chosen, 4, chunks=2).tolist() == [[1, 0, 0, 0], [1, 2, 1, 0]]


def drawn(tmp_path, monkeypatch, layers, documents, block_size):
    """The figure that is drawn."""
    import matplotlib.figure

    figures = []
    save = matplotlib.figure.Figure.savefig
    monkeypatch.setattr(
        matplotlib.figure.Figure, "savefig", lambda self, *a, **k: (figures.append(self), save(self, *a, **k))
    )
    draw_heat_maps(layers, torch.tensor(documents), block_size, tmp_path / "map.png")
    assert (tmp_path / "map.png").stat().st_size > 1000
    return figures[0]


def test_the_picture_says_what_it_shows(tmp_path, monkeypatch):
    """Two layers, documents of 24 and 40 tokens in blocks of 16: 2 blocks and 3."""
    chosen = torch.full((64, 2, 1), -1, dtype=torch.int32)
    chosen[16:24, :, 0], chosen[40:, 1, 0] = 0, 2
    figure = drawn(tmp_path, monkeypatch, {"layer 1": chosen, "layer 2": chosen}, [0, 24, 64], 16)
    first, second, bar = figure.axes
    assert figure.get_suptitle() == "Blocks chosen: 64 tokens, blocks of 16, 2 heads; red: documents start"
    assert bar.get_ylabel() == "times chosen by 1 tokens, all heads"
    assert (first.get_title(), second.get_title()) == ("layer 1", "layer 2")
    (image,) = first.images
    assert image.get_extent() == [0, 5, 64, 0] or tuple(image.get_extent()) == (0, 5, 64, 0)
    counts = image.get_array().filled(0)
    assert counts.shape == (64, 5) and counts[20].tolist() == [2, 0, 0, 0, 0] and counts[50].tolist() == [0, 0, 1, 0, 0]
    starts = [line.get_segments()[0].tolist() for line in first.collections]
    assert starts == [[[0, 24], [5, 24]], [[2, 0], [2, 64]]], "a line at the second document's first token and block"


def test_one_document_and_nothing_chosen(tmp_path, monkeypatch):
    chosen = torch.full((32, 2, 0), -1, dtype=torch.int32)
    figure = drawn(tmp_path, monkeypatch, {"layer 1": chosen}, [0, 32], 16)
    assert not figure.axes[0].collections and "documents" not in figure.get_suptitle()


def test_layers_without_names_are_counted():
    """Each in the order of its calls; what activation checkpointing repeats in backward is recorded once."""
    recorder = SelectionRecorder()
    cp = CPContext(None, "zigzag", 64, observer=recorder)
    weights = torch.nn.Parameter(torch.randn(3, 64, 2, 8))

    def layer(x):
        return moba_attention(x, x, x, MoBAConfig(16, 2), cp=cp)

    for x in weights:
        checkpoint(layer, x, use_reentrant=False).sum().backward()
    assert list(recorder.layers) == ["layer 1", "layer 2", "layer 3"]
    for number, x in enumerate(weights.detach(), 1):
        assert torch.equal(recorder.layers[f"layer {number}"].long(), reference.select_blocks(x, x, 16, 2))
