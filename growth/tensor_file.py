"""The safetensors format: where tensors lie, written one at a time, bytes copied as they are.

A file is 8 bytes with the length of a header, the header in JSON, and one tensor after another.
"""

import errno
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

import torch
from torch import Tensor

from apical._extras import require

safetensors = require("safetensors", extra="hf", what="reading a checkpoint")

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
INTEGERS = {"U8": torch.uint8, "I32": torch.int32, "I64": torch.int64}
_NAMES = {dtype: name for name, dtype in (DTYPES | INTEGERS).items()}
# pieces of 1 MiB took a third of the time of 16 MiB, which leave the cache (2026-11-22, Xeon, ext4)
_PIECE = 1 << 20
# what a file system says that cannot copy within the kernel
_CANNOT_COPY = (errno.EXDEV, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL, errno.EPERM)


@dataclass(frozen=True)
class Form:
    """What a tensor is, without its values."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return self.dtype.itemsize * math.prod(self.shape)


@dataclass(frozen=True)
class Stored(Form):
    """A tensor in a file: the bytes from `start` on."""

    name: str
    file: Path
    start: int

    def read(self) -> Tensor:
        """Return the tensor, in memory of its own.

        Raises:
            ValueError: the file ends within it.
        """
        data = torch.empty(self.nbytes, dtype=torch.uint8)
        view = data.numpy().data
        with self.file.open("rb", buffering=0) as file:
            file.seek(self.start)
            done = 0
            while done < self.nbytes:
                count = file.readinto(view[done:])
                if not count:
                    raise self.cut_short()
                done += count
        return data.view(self.dtype).view(self.shape)

    def cut_short(self) -> ValueError:
        """Return the error that the file ends within the tensor."""
        return ValueError(f"{self.file} ends within {self.name}; it changed since it was opened")


def read_header(path: Path, *, integers: bool) -> dict[str, Stored]:
    """Return the tensors of a file by their names.

    Raises:
        ValueError: the file is unreadable or cut short, or has tensors of other dtypes.
    """
    accepted = DTYPES | INTEGERS if integers else DTYPES
    try:
        # checks that headers, sizes and the length of the file agree
        with safetensors.safe_open(path, framework="pt"):
            pass
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is not a readable safetensors file: {error}") from None
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        entries = json.loads(file.read(length))
    entries.pop("__metadata__", None)
    for name, entry in entries.items():
        if entry["dtype"] not in accepted:
            known = ", ".join(accepted)
            raise ValueError(f"{path} stores {name} as {entry['dtype']}; expected one of {known}")
    return {
        name: Stored(
            tuple(entry["shape"]), accepted[entry["dtype"]], name, path,
            8 + length + entry["data_offsets"][0],
        )
        for name, entry in entries.items()
    }  # fmt: skip


def write_tensors(
    path: Path,
    forms: Mapping[str, Form],
    tensor: Callable[[str], Tensor | Stored],
    *,
    wrote: Callable[[int], object],
) -> None:
    """Write a file, one tensor after another, and wait until the disk has it.

    The file gets its name when it is whole. Memory: one tensor. What is stored in another file is
    copied without being decoded.

    Args:
        path: the file.
        forms: of its tensors.
        tensor: returns one of them, or where its bytes lie.
        wrote: is told how many bytes each tensor had.

    Raises:
        OSError: it could not be written.
    """
    # longer elements first: then every tensor begins at a multiple of its own
    forms = dict(sorted(forms.items(), key=lambda item: -item[1].dtype.itemsize))
    unfinished = path.with_name(f"{path.name}.partial")
    with unfinished.open("wb", buffering=0) as file:
        with _named(path):
            _write(file, memoryview(_header(forms)))
        for name, form in forms.items():
            value = tensor(name)
            assert (tuple(value.shape), value.dtype) == (form.shape, form.dtype), name
            with _named(path):
                if isinstance(value, Stored):
                    _copy(value, file)
                else:
                    _write(file, _bytes(value))
            wrote(form.nbytes)
        with _named(path):
            os.fsync(file.fileno())
    unfinished.rename(path)


def _header(forms: Mapping[str, Form]) -> bytes:
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, form in forms.items():
        start, end = end, end + form.nbytes
        entries[name] = {
            "dtype": _NAMES[form.dtype],
            "shape": form.shape,
            "data_offsets": (start, end),
        }
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _bytes(tensor: Tensor) -> memoryview:
    flat = tensor.detach().cpu().contiguous().flatten()
    return flat.view(torch.uint8).numpy().data


def _write(file: FileIO, data: memoryview) -> None:
    while data:
        data = data[file.write(data) :]


def _copy(stored: Stored, file: FileIO) -> None:
    with stored.file.open("rb", buffering=0) as source:
        done = 0
        while done < stored.nbytes:
            count = _copy_some(source, file, stored.start + done, stored.nbytes - done)
            if not count:
                raise stored.cut_short()
            done += count


def _copy_some(source: FileIO, file: FileIO, at: int, left: int) -> int:
    """Copy some bytes to where `file` stands, within the kernel if it can; return how many."""
    try:
        return os.copy_file_range(source.fileno(), file.fileno(), left, at)
    except OSError as error:
        if error.errno not in _CANNOT_COPY:
            raise
    data = os.pread(source.fileno(), min(left, _PIECE), at)
    _write(file, memoryview(data))
    return len(data)


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Say which file could not be written."""
    try:
        yield
    except OSError as error:
        raise OSError(f"{path.name} could not be written: {error.strerror}") from None
