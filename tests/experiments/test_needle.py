"""A model that is trained to find a key again answers prompts in ``moba-cp generate``."""

import numpy as np
import pytest

from moba_cp import cli
from moba_cp.experiments.retrieval import KEYS, make_document, write_documents

CONFIG = """
model: {vocab_size: 256, n_layers: 2, hidden_size: 64, n_heads: 4, qk_norm: true, recompute: none}
attention: {block_size: 16, top_k: 3}
data: {path: training, validation_path: validation, seq_len: 960, packing: best_fit}
optimizer: {lr: 5.0e-3, warmup_steps: 20}
run: {directory: needle, dtype: float32, device: cpu, steps: 400, validate_every: 400, checkpoint_every: 400}
"""


@pytest.mark.slow
def test_generate_says_the_value_of_the_key_that_is_asked(tmp_path, monkeypatch, capsys):
    """Half of the keys that a query can see are of blocks that MoBA leaves out."""
    monkeypatch.chdir(tmp_path)
    generator = np.random.default_rng(0)
    for split, n in (("training", 8000), ("validation", 64)):
        write_documents(tmp_path / split, [make_document(generator, 96, 1, 1) for _ in range(n)])
    (tmp_path / "needle.yaml").write_text(CONFIG)
    assert cli.main(["train", "needle.yaml"]) == 0
    right = 0
    for _ in range(20):
        text = make_document(generator, 96, 1, 1).tokens.tobytes().decode()
        prompt, value = text[:-1], text[-1]
        assert prompt[-1].encode() in KEYS and prompt.count(prompt[-1]) == 2
        capsys.readouterr()
        assert cli.main(["generate", "needle", "--prompt", prompt, "--max-tokens", "1", "--device", "cpu"]) == 0
        right += capsys.readouterr().out[0] == value
    # Who guesses is right once in ten.
    assert right >= 16
