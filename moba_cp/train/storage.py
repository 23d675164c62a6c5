"""Reading and writing the files of a checkpoint by torch.distributed.checkpoint, without running what they hold.

Its ``.metadata`` is a pickle, and PyTorch loads it, and what is no tensor in the shards, as pickles that may call
anything. Here both are read by unpicklers that know a short list of names.
"""

import io
import pickle  # nosec B403
import shutil
from enum import Enum
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta

_CHECKPOINT = "torch.distributed.checkpoint."
# What a `.metadata` is made of: its own classes, and dtypes, shapes and paths. None of them does anything when made.
_ALLOWED = {
    _CHECKPOINT + "metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    _CHECKPOINT + "filesystem": {"_StorageInfo"},
    "torch": {"Size", "strided", "sparse_coo", *(n for n in dir(torch) if isinstance(getattr(torch, n), torch.dtype))},
    "torch.serialization": {"_get_layout"},
    "collections": {"OrderedDict"},
    "pathlib": {"Path", "PosixPath", "PurePath", "PurePosixPath"},
    "pathlib._local": {"Path", "PosixPath", "PurePath", "PurePosixPath"},
}


class StorageError(ValueError):
    """A checkpoint could not be written or read; the message says on which rank, and why."""


def write(state: dict[str, Any], folder: Path, group: dist.ProcessGroup | None = None) -> None:
    """Write ``state`` into ``folder``, each rank its shard, synced to the disk; collective over ``group``.

    Raises:
        StorageError: on all ranks, if one could not.
        KeyboardInterrupt: on all ranks, if one was interrupted.
    """
    _told(lambda: dcp.save(state, storage_writer=dcp.FileSystemWriter(folder), process_group=group), folder, "written")


def read(state: dict[str, Any], folder: Path, group: dist.ProcessGroup | None = None) -> None:
    """Read the tensors and values of ``state`` from ``folder``, in place; collective over ``group``.

    Raises:
        StorageError: on all ranks, if one could not.
    """
    reader = dict(storage_reader=_Reader(folder), planner=_Planner(), process_group=group)
    _told(lambda: dcp.load(state, **reader), folder, "read")


def _told(action, folder: Path, done: str) -> None:
    try:
        action()
    except CheckpointException as failed:
        # It is no Exception, and its text is every rank's traceback. Ctrl-C is among what it wraps.
        if any(isinstance(error, KeyboardInterrupt) for error, _ in failed.failures.values()):
            raise KeyboardInterrupt from None
        rank, (error, _) = min(failed.failures.items())
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        text = f"{type(error).__name__}: {lines[0] if lines else ''}"
        if done == "written" and not isinstance(error, OSError):
            # PyTorch's writer of archives says nothing of a full disk.
            text += f" ({shutil.disk_usage(folder).free:,} bytes free on its disk)"
        raise StorageError(f"{folder}: could not be {done}: rank {rank}: {text}") from None


def _member(kind: Any, name: str) -> Enum:
    """As Python 3.11.0 to 3.11.3 write a member of an enumeration: getattr of its class. Of other things it is none."""
    if not (isinstance(kind, type) and issubclass(kind, Enum) and name in kind.__members__):
        raise pickle.UnpicklingError(f"asks {kind!r} for {name!r}, which no checkpoint does: it may run code; not read")
    return kind[name]


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("builtins", "getattr"):
            return _member
        if name not in _ALLOWED.get(module, ()):
            raise pickle.UnpicklingError(f"names {module}.{name}, which no checkpoint holds: it may run code; not read")
        return super().find_class(module, name)


class _Reader(dcp.FileSystemReader):
    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        path = self._get_metadata_path(kwargs.get("rank"))
        with open(path, "rb") as file:
            metadata = _Unpickler(file).load()
        if not isinstance(metadata, Metadata):
            raise pickle.UnpicklingError(f"{path}: holds no metadata of a checkpoint")
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        for info in metadata.storage_data.values():
            # A shard lies beside its metadata, nowhere else.
            if Path(info.relative_path).name != info.relative_path:
                raise pickle.UnpicklingError(f"{path}: names the file {info.relative_path} outside of its folder")
        return metadata


class _Planner(DefaultLoadPlanner):
    def load_bytes(self, read_item: Any, value: io.BytesIO) -> None:
        # The planner's own would unpickle anything.
        plain = io.BytesIO()
        torch.save(torch.load(value, weights_only=True), plain)
        plain.seek(0)
        super().load_bytes(read_item, plain)
