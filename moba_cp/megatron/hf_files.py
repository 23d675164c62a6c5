"""The files of a Hugging Face checkpoint: read by its index, and replaced as a whole."""

import json
import re
import shutil
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

WEIGHTS, INDEX, CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"
_SHARD = re.compile(r"model-\d+-of-\d+\.safetensors")
# Files of an export that is being written, within the folder.
_STAGING = ".save_hf"


class CheckpointFiles:
    """The tensors of a checkpoint, by name; files are mapped, not read.

    Those of ``model.safetensors.index.json`` if there is one, else of ``model.safetensors``, else of a single file of
    any other name. Other files are not looked at.

    Raises:
        ValueError: no weights, files of two exports, or an index and files that contradict one another.
    """

    def __init__(self, path: Path):
        self.path, self._files = path, {}
        if not (path / INDEX).exists():
            self._add(_only_file(path))
            return
        weight_map = _read_index(path)
        if (path / WEIGHTS).exists() and WEIGHTS not in weight_map.values():
            raise ValueError(f"{path} holds both {WEIGHTS} and {INDEX}, which does not name it; remove the older one")
        for name in sorted(set(weight_map.values())):
            self._add(path / name)
        for name, file in weight_map.items():
            if self._files.get(name, (None,))[0] != file:
                raise ValueError(f"{path / INDEX} places {name} in {file}, which does not hold it; export it again")
        extra = {name for name in self._files if name not in weight_map and not is_inverse_frequency(name)}
        if extra:
            name = min(extra)
            raise ValueError(
                f"{path / self._files[name][0]} holds {name}, which {INDEX} does not name; export it again"
            )

    def _add(self, file: Path) -> None:
        try:
            opened = safe_open(file, framework="pt")
            names = list(opened.keys())
        except FileNotFoundError:
            raise ValueError(f"{self.path / INDEX} names {file.name}, which is not there; export it again") from None
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{file} is no whole safetensors file ({error}); export it again") from None
        for name in names:
            if name in self._files:
                raise ValueError(f"{name} is in {self._files[name][0]} and in {file.name}; export it again")
            self._files[name] = file.name, opened

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def names(self) -> set[str]:
        return set(self._files)

    def read(self, name: str, wanted_by: str) -> Tensor:
        if name not in self._files:
            raise ValueError(f"the checkpoint has no {name}, which {wanted_by} needs; give the model the same parts")
        return self._files[name][1].get_tensor(name)


def is_inverse_frequency(name: str) -> bool:
    """Whether a tensor of old checkpoints says what config.json says."""
    return name.endswith("rotary_emb.inv_freq")


def _only_file(path: Path) -> Path:
    files = sorted(file.name for file in path.glob("*.safetensors"))
    shards = [name for name in files if _SHARD.fullmatch(name)]
    if (path / _STAGING).exists() and WEIGHTS not in files:
        raise ValueError(
            f"{path} holds no whole checkpoint, since save_hf was cut off: see {_STAGING}/new for what it wrote and "
            f"{_STAGING}/old for what was there before; export it again, or move one of them back"
        )
    if shards:
        raise ValueError(f"{path} holds {shards[0]} but no {INDEX}, which says what belongs together; export it again")
    if not files:
        raise ValueError(f"path={str(path)!r} holds no *.safetensors; name a folder that does")
    if WEIGHTS in files:
        return path / WEIGHTS
    if len(files) > 1:
        raise ValueError(f"{path} holds {' and '.join(files[:2])} but neither {WEIGHTS} nor {INDEX}; leave one of them")
    return path / files[0]


def _read_index(path: Path) -> dict[str, str]:
    try:
        weight_map = json.loads((path / INDEX).read_text())["weight_map"]
        good = all(isinstance(file, str) and Path(file).name == file for file in weight_map.values())
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError):
        good = False
    if not good or not weight_map:
        raise ValueError(f"{path / INDEX} has no weight_map from names to files of the folder; export it again")
    return weight_map


class Export:
    """A checkpoint that takes the place of an older one in the same folder, if there is one, once it is whole.

    Files are written into ``folder``; :meth:`commit` moves the older export aside and the new one in its place. The
    file that readers begin with goes first and comes last: a process that is killed leaves the older export, the new
    one, or a folder that is refused, with both in it. Other files of the folder, such as a tokenizer's, stay.

    Args:
        path: folder of the checkpoint; made if need be.

    Raises:
        ValueError: an earlier export was cut off between moving the older one aside and taking its place.
    """

    def __init__(self, path: Path):
        self.path = path
        self._staging = path / _STAGING
        if (self._staging / "old").exists() and not any((path / name).exists() for name in (INDEX, WEIGHTS)):
            raise ValueError(
                f"{self._staging} holds two checkpoints, in new and in old, since save_hf was cut off; move one of "
                "them back if it is needed, then remove the folder"
            )
        shutil.rmtree(self._staging, ignore_errors=True)
        self.folder = self._staging / "new"
        self.folder.mkdir(parents=True)

    def commit(self) -> None:
        """Replace the older export."""
        old = self._staging / "old"
        old.mkdir()
        for name in _files_of_export(self.path):
            (self.path / name).replace(old / name)
        names = sorted(file.name for file in self.folder.iterdir())
        for name in names:
            # Safetensors lets nobody but their owner read its files.
            shutil.copymode(self.folder / CONFIG, self.folder / name)
        for name in sorted(names, key=lambda name: name in (WEIGHTS, INDEX)):
            (self.folder / name).replace(self.path / name)
        self.discard()

    def discard(self) -> None:
        """Remove what was written and not committed."""
        shutil.rmtree(self._staging, ignore_errors=True)


def _files_of_export(path: Path) -> list[str]:
    """What an export consists of, the files that readers begin with first."""
    shards = {file.name for file in path.glob("*.safetensors") if _SHARD.fullmatch(file.name)}
    if (path / INDEX).exists():
        try:
            shards |= set(_read_index(path).values())
        except ValueError:
            pass  # what it names cannot be told
    names = [INDEX, WEIGHTS, CONFIG, *sorted(shards - {WEIGHTS})]
    return [name for name in names if (path / name).exists()]
