"""Every config that comes with the repository: it is valid, and says what its name says."""

import functools
from pathlib import Path

import pytest

from moba_cp.train import plan as plan_module
from moba_cp.train.config import TrainConfig
from moba_cp.train.plan import plan_run
from moba_cp.train.yaml_config import load

CONFIGS = Path(__file__).parents[1] / "configs"
# Several configs read the same text, and reading it takes seconds.
OPEN_ONCE = functools.cache(plan_module.open_corpora)


@pytest.mark.parametrize("path", sorted(CONFIGS.rglob("*.yaml")), ids=lambda p: str(p.relative_to(CONFIGS)))
def test_config_is_valid_on_eight_ranks(path, monkeypatch):
    monkeypatch.setattr(plan_module, "open_corpora", OPEN_ONCE)
    config = load(TrainConfig, path)
    if config.data.path is None or Path(config.data.path).exists():
        assert plan_run(config, 8).summary()


@pytest.mark.parametrize("last", [1, 3, 5, 10])
def test_layerwise_hybrids(last):
    overrides = [f"attention.full_layers=last {last}"] if last != 3 else []
    config = load(TrainConfig, CONFIGS / "hybrid" / "layers_last.yaml", overrides)
    full = config.attention.full_layer_numbers(config.model.n_layers)
    assert full == set(range(21 - last, 21))
    assert config.model == load(TrainConfig, CONFIGS / "hybrid" / "switch_90_10.yaml").model, "one continues the other"


def test_the_training_hybrid():
    config = load(TrainConfig, CONFIGS / "hybrid" / "switch_90_10.yaml")
    steps, data = config.run.steps, config.data
    assert steps * data.seq_len * data.sequences_per_step == pytest.approx(30e9, rel=1e-3)
    assert 1.4e9 < config.model.n_parameters() < 1.7e9
    kinds = [config.attention.at(step, steps).default for step in (1, 25749, 25750, steps)]
    assert kinds == ["moba", "moba", "full", "full"]


def test_llama_8b_1m():
    config = load(TrainConfig, CONFIGS / "hybrid" / "llama_8b_1m.yaml")
    attention = config.attention
    assert (attention.block_size, attention.top_k) == (4096, 12)
    assert attention.full_layer_numbers(config.model.n_layers) == {30, 31, 32}
    assert config.data.seq_len == 2**20
    # Llama 3.1 8B has 6.98e9 parameters without embeddings.
    assert config.model.n_parameters() == pytest.approx(6.98e9, rel=1e-2)
