"""Recording selections and drawing them."""

import pytest
import torch

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
    assert torch.equal(gate.chosen.long(), reference.select_blocks(q, k, 16, 3, documents))
    assert gate.bounds.tolist() == documents.tolist()
    with pytest.raises(ValueError, match="gate-layer=1 is not in .*; it has layer 2, layer 3, layer 11"):
        RecordedGate(path, 1)


def test_heat_map_counts_choices(tmp_path):
    chosen = torch.tensor([[[-1, -1]], [[0, -1]], [[0, 1]], [[1, 2]]], dtype=torch.int32)
    assert heat_map(chosen, 4, chunks=2).tolist() == [[1, 0, 0, 0], [1, 2, 1, 0]]
    draw_heat_maps({"layer 1": chosen, "layer 2": chosen}, 4, tmp_path / "map.png")
    assert (tmp_path / "map.png").stat().st_size > 1000
