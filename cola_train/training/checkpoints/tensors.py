"""A checkpoint's tensors to safetensors files and back, by torch's distributed checkpointing.

No pickle. Any number of processes reads what any number wrote; a single process reads single
tensors without a process group.
"""

import contextlib
import io
import os
import warnings
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import xxhash
from torch import Tensor
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.hf_storage import (
    HuggingFaceStorageReader,
    HuggingFaceStorageWriter,
)
from torch.distributed.checkpoint.metadata import Metadata

from cola_train.checksums import FileChecksum, file_checksum
from cola_train.config.settings import UserError
from cola_train.training.checkpoints.folder import CheckpointManifest, recovery_hint

# The library wraps errors of any process in CheckpointException, which is no Exception.
_ERRORS = (Exception, CheckpointException)


class _HashingStream:
    """What the writer writes into: counts and hashes on the way, and is durable once closed."""

    def __init__(self, stream: io.IOBase, facts: dict[str, FileChecksum], name: str) -> None:
        self._stream, self._facts, self._name = stream, facts, name
        self._digest, self._size = xxhash.xxh3_128(), 0
        self.flush, self.fileno = stream.flush, stream.fileno

    def write(self, data: bytes) -> int:
        self._digest.update(data)
        self._size += len(data)
        self._stream.write(data)
        return len(data)

    def tell(self) -> int:
        return self._size

    def close(self) -> None:
        if not self._stream.closed:
            # The writer syncs before its buffer is flushed; this is the sync that counts.
            self._stream.flush()
            os.fsync(self._stream.fileno())
            self._facts[self._name] = FileChecksum(self._size, self._digest.hexdigest())
            self._stream.close()


class _HashingFileSystem(FileSystem):
    def __init__(self) -> None:
        self.facts: dict[str, FileChecksum] = {}

    @contextlib.contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[Any]:
        with super().create_stream(path, mode) as stream:
            yield _HashingStream(stream, self.facts, Path(path).name) if "w" in mode else stream


class Writing:
    """One process' part of a save, under way or done."""

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        folder: Path,
        group: dist.ProcessGroup,
        in_background: bool,
    ) -> None:
        """Start to write `tensors`, of the same names on every process, into an empty folder.

        In the background they are written from a copy in host memory, and may change at once. The
        gloo `group` of all processes is nothing else's until this is done.
        """
        self.folder = folder
        writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
        self._files = writer.fs = _HashingFileSystem()
        self._problem: str | None = None
        self._future: Future[Any] | None = None
        save = state_dict_saver.async_save if in_background else state_dict_saver.save
        with self._problems_kept():
            saved = save(dict(tensors), storage_writer=writer, process_group=group)
            if in_background:
                assert isinstance(saved, Future)  # of threads
                self._future = saved

    @property
    def done(self) -> bool:
        """Whether `result` will not wait."""
        return self._future is None or self._future.done()

    def result(self) -> tuple[dict[str, FileChecksum], str | None]:
        """The files that this process wrote, and what went wrong, if anything did.

        It waits until they are on disk, and reads each again: it must be as it was written.
        """
        with self._problems_kept():
            if self._future is not None:
                self._future.result()
            for name, written in self._files.facts.items():
                if file_checksum(self.folder / name) != written:
                    raise OSError(f"{name} does not read back as it was written")
        return self._files.facts, self._problem

    @contextlib.contextmanager
    def _problems_kept(self) -> Iterator[None]:
        try:
            with warnings.catch_warnings():
                # Of torch's own making: its stager's use of deprecated storage types.
                warnings.filterwarnings("ignore", category=UserWarning, module="torch.*")
                yield
        except _ERRORS as error:
            self._problem = self._problem or _reason(error)


class _Reader(HuggingFaceStorageReader):
    """Reads the files' headers once, for any number of loads."""

    _headers: Metadata | None = None

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        if self._headers is None:
            self._headers = super().read_metadata()
        return self._headers


class CheckpointReader:
    """Fills tensors from a checkpoint whose files are known to be intact."""

    def __init__(
        self, folder: Path, manifest: CheckpointManifest, *, one_process: bool = False
    ) -> None:
        """With `one_process`, `load` needs no process group; else it is a collective call."""
        self._folder, self._manifest, self._one_process = folder, manifest, one_process
        self._reader = _Reader(str(folder))

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Fill live tensors, sharded or plain, by saved name; a UserError if one does not fit."""
        shapes = self._manifest.shapes
        problems = [f"{name}: missing" for name in tensors if name not in shapes]
        problems += [
            f"{name}: shape {shapes[name]}, the run needs {tuple(tensor.shape)}"
            for name, tensor in tensors.items()
            if name in shapes and shapes[name] != tuple(tensor.shape)
        ]
        if problems:
            raise UserError(
                f"The checkpoint {self._folder} does not fit this run:\n  " + "\n  ".join(problems)
            )
        alone = ".*assuming the intent is to load in a single process"
        try:
            with torch.no_grad(), warnings.catch_warnings():
                warnings.filterwarnings("ignore", message=alone)
                state_dict_loader.load(
                    tensors, storage_reader=self._reader, no_dist=self._one_process
                )
        except _ERRORS as error:
            raise UserError(
                f"The checkpoint {self._folder} cannot be read: {_reason(error)}. "
                f"{recovery_hint(self._folder)}"
            ) from error


def _reason(error: BaseException) -> str:
    """The first cause in a checkpointing library's error, in one line."""
    failures = getattr(error, "failures", None)
    if failures:
        error = next(iter(failures.values()))[0]
    while error.__cause__ is not None:
        error = error.__cause__
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    lines = str(error).strip().splitlines()
    return lines[-1] if lines else type(error).__name__
