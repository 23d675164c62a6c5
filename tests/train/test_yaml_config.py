"""YAML and overrides into dataclasses: what is taken, and what one line is said about the rest."""

from dataclasses import dataclass, field
from typing import Literal

import pytest

from moba_cp.train.config import TrainConfig
from moba_cp.train.yaml_config import build, load, to_yaml


@dataclass(frozen=True)
class Inner:
    block_size: int = 64
    layers: str | tuple[int, ...] = "none"

    def __post_init__(self):
        if self.block_size % 16:
            raise ValueError(f"block_size={self.block_size} is not a multiple of 16; use 64")
        if self.layers == "all":
            raise ValueError("too many layers")


@dataclass(frozen=True)
class Outer:
    name: str
    rate: float = 0.5
    count: int = 3
    flag: bool = False
    limit: float | None = None
    kind: Literal["fast", "exact"] = "fast"
    pair: tuple[int, float] = (1, 2.0)
    pattern: str | None = None
    inner: Inner = field(default_factory=Inner)


def outer(**values):
    return build(Outer, {"name": "x"} | values)


@pytest.mark.parametrize(
    "values, expected",
    [
        ({"rate": 1}, Outer("x", rate=1.0)),
        ({"rate": "1e-3"}, Outer("x", rate=1e-3)),
        ({"limit": None}, Outer("x", limit=None)),
        ({"limit": 2}, Outer("x", limit=2.0)),
        ({"kind": "exact"}, Outer("x", kind="exact")),
        ({"pair": [4, "5e1"]}, Outer("x", pair=(4, 50.0))),
        ({"inner": {"layers": [1, 4]}}, Outer("x", inner=Inner(layers=(1, 4)))),
        ({"inner": {"layers": "last 2"}}, Outer("x", inner=Inner(layers="last 2"))),
        ({"inner": {}}, Outer("x")),
    ],
)
def test_taken(values, expected):
    result = outer(**values)
    assert result == expected
    assert type(result.rate) is float


@pytest.mark.parametrize(
    "values, message",
    [
        ({"counts": 1}, "counts: unknown key; did you mean count?"),
        ({"zzz": 1}, "zzz: unknown key; expected one of name, rate, count, flag, limit, kind, pair, pattern, inner"),
        ({"inner": {"blocksize": 1}}, "inner.blocksize: unknown key; did you mean block_size?"),
        ({"inner": {"block_size": 100}}, "inner.block_size=100 is not a multiple of 16; use 64"),
        ({"inner": {"layers": "all"}}, "inner: too many layers"),
        ({"inner": 7}, "inner=7: expected keys and values, such as {block_size: ...}"),
        ({"count": 4.0}, "count=4.0: expected a whole number, not a number"),
        ({"count": "4"}, "count='4': expected a whole number, not text"),
        ({"count": True}, "count=True: expected a whole number, not true or false"),
        ({"count": None}, "count=None: expected a whole number, not null"),
        ({"flag": 1}, "flag=1: expected true or false, not a whole number"),
        ({"rate": "fast"}, "rate='fast': expected a number, not text"),
        ({"rate": True}, "rate=True: expected a number, not true or false"),
        ({"rate": float("nan")}, "rate=nan: expected a number, not nan or infinity"),
        ({"limit": [1]}, "limit=[1]: expected a number or null, not a list"),
        ({"name": 5}, "name=5: expected text, not a whole number"),
        ({"kind": "fastest"}, "kind='fastest': did you mean fast? Expected one of fast, exact"),
        ({"kind": 3}, "kind=3: expected one of fast, exact, not a whole number"),
        ({"pair": [1, 2, 3]}, "pair=[1, 2, 3]: expected a list of 2 values, not a list"),
        (
            {"inner": {"layers": [1, "b"]}},
            "inner.layers=[1, 'b']: expected text or a list, each a whole number, not a list",
        ),
    ],
)
def test_refused(values, message):
    with pytest.raises(ValueError) as caught:
        outer(**values)
    assert str(caught.value) == message


def test_missing_key():
    with pytest.raises(ValueError, match="^name: missing; it has no default$"):
        build(Outer, {})


def test_overrides_replace_values_and_keep_the_rest(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("name: x\ninner: {block_size: 32}\n")
    config = load(Outer, path, ["inner.layers=[2, 3]", "rate=1e-2", "inner.layers=last 1", "limit=null"])
    assert config == Outer("x", rate=0.01, inner=Inner(32, "last 1"))


@pytest.mark.parametrize(
    "typed, value",
    [
        ("*.txt", "*.txt"),
        ("'*.txt'", "*.txt"),
        ("2024", "2024"),
        ("true", "true"),
        ("a: b", "a: b"),
        ("[x", "[x"),
        ("#1 & #2 ", "#1 & #2"),
        ("null", None),
        ("", None),
    ],
)
def test_the_value_of_a_text_key_is_text(tmp_path, typed, value):
    path = tmp_path / "c.yaml"
    path.write_text("name: x\n")
    assert load(Outer, path, [f"pattern={typed}"]).pattern == value


def test_a_key_that_takes_text_too_takes_what_yaml_cannot_read(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("name: x\n")
    assert load(Outer, path, ["inner.layers=[1, 2]"]).inner.layers == (1, 2)
    assert load(Outer, path, ["inner.layers=*x"]).inner.layers == "*x"


@pytest.mark.parametrize(
    "override, message",
    [
        ("rate", "--set rate: expected SECTION.KEY=VALUE, such as --set attention.top_k=4"),
        ("=3", "--set =3: expected SECTION.KEY=VALUE, such as --set attention.top_k=4"),
        ("inner..x=3", "--set inner..x=3: expected SECTION.KEY=VALUE, such as --set attention.top_k=4"),
        ("rate.x=3", "--set rate.x=3: rate is 2 and has no keys"),
        ("inner.blok_size=3", "inner.blok_size: unknown key; did you mean block_size?"),
        ("rate=[1", "--set rate=[1: line 1, column 3: expected ',' or ']', but got '<stream end>'"),
    ],
)
def test_refused_overrides(tmp_path, override, message):
    path = tmp_path / "c.yaml"
    path.write_text("name: x\nrate: 2\n")
    with pytest.raises(ValueError) as caught:
        load(Outer, path, [override])
    assert str(caught.value) == message


@pytest.mark.parametrize(
    "text, message",
    [
        ("name: x\nname: y\n", "line 2, column 1: key 'name' stands twice"),
        ("name: [x\n", "line 2, column 1: expected ',' or ']', but got '<stream end>'"),
        ("- name\n", "config=['name']: expected keys and values"),
        ("name: *.txt\n", "put quotes around text that begins with *"),
        ("name: *x\n", "found undefined alias 'x'; put quotes around text that begins with *"),
        ("name: !!python/object:os.system x\n", "could not determine a constructor"),
    ],
)
def test_refused_files(tmp_path, text, message):
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(ValueError) as caught:
        load(Outer, path)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_override_of_a_file_without_keys(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("- name\n")
    with pytest.raises(ValueError, match=r"^--set rate=1: the file is \['name'\] and has no keys$"):
        load(Outer, path, ["rate=1"])


def test_binary_file_is_refused(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_bytes(b"name: \xff\xfe\n")
    with pytest.raises(ValueError, match="not a text file .* at byte 6"):
        load(Outer, path)


def test_resolved_config_reads_back_equal(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("attention: {full_layers: [1, 3], block_size: 32}\noptimizer: {lr: 3e-4, clip_norm: null}\n")
    config = load(TrainConfig, path)
    assert config.attention.full_layers == (1, 3) and config.optimizer.lr == 3e-4
    again = tmp_path / "again.yaml"
    again.write_text(to_yaml(config))
    assert load(TrainConfig, again) == config


def test_empty_file_is_all_defaults(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("# nothing\n")
    assert load(TrainConfig, path) == TrainConfig()
