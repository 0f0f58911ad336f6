"""Read tensors from safetensors files onto a mesh, by byte ranges, several at once.

    tensors = open_tensors("gs://bucket/Qwen3-8B")          # or a local directory
    for array in stream([(tensors["model.norm.weight"], sharding)], "bfloat16"): ...

A single process reads what its devices need. With several, each reads a contiguous band of every tensor's
rows, so together they read the files once; a jitted function then reshards the array, and the chips exchange
their parts over the interconnect. Read-ahead is bounded, and nothing is kept on the host.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jaxlora.runtime.errors import UserError
from jaxlora.runtime.folders import file_in
from jaxlora.runtime.remote import file_system, is_remote, weights_of

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
READERS = 8  # threads; a bucket needs several requests in flight, a disk at least two
AHEAD_BYTES = 256 * 2**20  # read ahead of placement, per host
WHOLE_BYTES = 512 * 2**20  # a larger tensor is never held whole on a host
HEADER_LIMIT = 100 * 2**20  # the format's own limit
_MAX_DIMENSIONS = 8
_DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}


@dataclass(frozen=True)
class StoredTensor:
    """The location of a tensor."""

    file: str
    key: str
    shape: tuple[int, ...]
    dtype: np.dtype
    offset: int  # of its first byte in the file

    @property
    def size(self) -> int:
        """Bytes of the whole tensor."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def row_bytes(self) -> int:
        return math.prod(self.shape[1:]) * self.dtype.itemsize

    def rows(self, start: int, stop: int) -> np.ndarray:
        """Read rows `[stop - start, ...]`."""
        begin, size = self.offset + start * self.row_bytes, (stop - start) * self.row_bytes
        return read_bytes(self.file, begin, size).view(self.dtype).reshape(stop - start, *self.shape[1:])


def read_bytes(path: str, start: int, size: int) -> np.ndarray:
    """Read exactly these bytes of a local file or an address such as `gs://bucket/file`, uint8 `[size]`.

    Raises:
      UserError: the file is missing, unreadable or too short.
    """
    try:
        if is_remote(path):
            filesystem, name = file_system(path)
            data = np.frombuffer(filesystem.cat_file(name, start=start, end=start + size), np.uint8)
        else:
            data = _read_local(path, start, size)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    if len(data) != size:
        raise UserError(f"{path}: ends before byte {start + size}; fetch it again")
    return data


def _read_local(path: str, start: int, size: int) -> np.ndarray:
    """Plain reads: a memory map would count every touched page as this process's memory."""
    buffer = _empty(size)
    view, done = memoryview(buffer), 0  # type: ignore[arg-type]
    handle = os.open(path, os.O_RDONLY)
    try:
        while done < size and (n := os.preadv(handle, [view[done:]], start + done)):
            done += n
    finally:
        os.close(handle)
    return buffer[:done]


def _empty(size: int) -> np.ndarray:
    """Uninitialised bytes aligned to 64, which the CPU backend can use without a copy."""
    buffer = np.empty(size + 64, np.uint8)
    start = -buffer.ctypes.data % 64
    return buffer[start : start + size]


def _contiguous(part: np.ndarray) -> np.ndarray:
    if part.flags.c_contiguous:
        return part
    copy = _empty(part.nbytes).view(part.dtype).reshape(part.shape)
    copy[...] = part
    return copy


def exists(path: str) -> bool:
    """Whether a local file or an address exists."""
    if not is_remote(path):
        return os.path.isfile(path)
    filesystem, name = file_system(path)
    return bool(filesystem.isfile(name))


def file_size(path: str) -> int:
    """Size in bytes of a local file or an address."""
    if not is_remote(path):
        return os.path.getsize(path)
    filesystem, name = file_system(path)
    return int(filesystem.size(name))


def check_slice(tensor: Any, key: str, shape: tuple[int, ...], asking: str, file: Path) -> None:
    """Refuse a tensor of an opened file that does not have this shape or a floating-point dtype.

    Args:
      asking: what requires the shape, in words.

    Raises:
      UserError: names the tensor.
    """
    if tuple(tensor.get_shape()) != shape:
        raise UserError(f"{file}: {key} has shape {tuple(tensor.get_shape())}; {asking} ask for {shape}")
    if tensor.get_dtype() not in ("F32", "F16", "BF16"):
        raise UserError(f"{file}: {key} is {tensor.get_dtype()}; it must be F32, F16 or BF16")


def slice_values(tensor: Any, key: str, file: Path) -> np.ndarray:
    """The values of a tensor of an opened file, float32.

    Raises:
      UserError: a value is not finite.
    """
    values = np.asarray(tensor[:]).astype(np.float32)
    if not np.isfinite(values).all():
        raise UserError(f"{file}: {key} holds NaN or infinity")
    return values


def open_tensors(directory: str | Path) -> dict[str, StoredTensor]:
    """Every tensor in a directory's safetensors files, from the file headers alone.

    Raises:
      UserError: a file is missing or damaged, or the index and the files disagree.
    """
    directory = weights_of(directory)
    listed = _listed(directory)
    tensors: dict[str, StoredTensor] = {}
    for file in _files(directory, listed):
        if not exists(file):
            raise UserError(
                f"{file}: missing; the directory must hold {SINGLE} or the parts that {INDEX} names"
            )
        for tensor in read_header(file):
            if tensor.key in tensors:
                raise UserError(f"{file}: {tensor.key} is stored twice")
            tensors[tensor.key] = tensor
    if listed is not None and set(listed) != set(tensors):
        odd = sorted(set(listed) ^ set(tensors))[:3]
        raise UserError(f"{directory}/{INDEX}: the index and the files disagree about {', '.join(odd)}")
    return tensors


def loaded_files(directory: str | Path) -> list[str]:
    """The safetensors files that `open_tensors` reads, sorted; files named by an index may be missing.

    Raises:
      UserError: the index is damaged.
    """
    directory = weights_of(directory)
    return _files(directory, _listed(directory))


def stale_index(directory: str | Path) -> bool:
    """Whether there is an index beside a single file; the latter is then read, as in Transformers."""
    directory = weights_of(directory)
    return exists(f"{directory}/{SINGLE}") and exists(f"{directory}/{INDEX}")


def _listed(directory: str) -> dict[str, str] | None:
    """The index: the file of each tensor. None if there is a single file, or no index."""
    index = f"{directory}/{INDEX}"
    if exists(f"{directory}/{SINGLE}") or not exists(index):
        return None
    if (size := file_size(index)) > HEADER_LIMIT:
        raise UserError(f"{index}: larger than {HEADER_LIMIT} bytes; this is not a safetensors index")
    try:
        listed = dict(_parse(read_bytes(index, 0, size))["weight_map"])
        if not all(isinstance(name, str) for name in listed.values()):
            raise ValueError("a file name is not text")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{index}: not a safetensors index: {error}") from None
    return listed


def _files(directory: str, listed: dict[str, str] | None) -> list[str]:
    names = [SINGLE] if listed is None else sorted(set(listed.values()))
    for name in names:
        if os.path.basename(name) != name:
            raise UserError(f"{directory}/{INDEX}: {name!r:.200} is not the name of a file beside it")
    if is_remote(directory):
        return [f"{directory}/{name}" for name in names]
    return [str(file_in(directory, name)) for name in names]


def read_header(file: str) -> list[StoredTensor]:
    """The tensors of one file, which has 8 bytes of header length, a JSON header, then the data.

    Raises:
      UserError: it is not a safetensors file, is damaged, or has a dtype that no base is stored in.
    """
    total = file_size(file)
    length = int.from_bytes(read_bytes(file, 0, min(8, total)).tobytes(), "little")
    if total < 8 or length > min(HEADER_LIMIT, total - 8):
        raise UserError(f"{file}: not a readable safetensors file: no valid header")
    try:
        header = _parse(read_bytes(file, 8, length))
        entries = {key: entry for key, entry in header.items() if key != "__metadata__"}
        tensors = [_stored(file, key, entry, 8 + length, total) for key, entry in entries.items()]
        _check_places(tensors, 8 + length, total)
        return tensors
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{file}: not a readable safetensors file: {error}") from None


def _parse(content: np.ndarray) -> Any:
    """Parse JSON, refusing duplicate keys in an object: the last one would silently win."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(found := dict(pairs)) < len(pairs):
            names = [name for name, _ in pairs]
            raise ValueError(f"{next(name for name in names if names.count(name) > 1)} is named twice")
        return found

    return json.loads(content.tobytes().decode("utf-8"), object_pairs_hook=unique)


def _stored(file: str, key: str, entry: dict[str, Any], data_start: int, total: int) -> StoredTensor:
    if entry["dtype"] not in _DTYPES:
        raise UserError(
            f"{file}: {key} is stored as {entry['dtype']}; only {', '.join(_DTYPES)} are supported"
        )
    dtype = np.dtype(jnp.dtype(_DTYPES[entry["dtype"]]))
    shape, (begin, end) = entry["shape"], entry["data_offsets"]
    if len(shape) > _MAX_DIMENSIONS or not all(type(n) is int and n >= 0 for n in (*shape, begin, end)):
        raise ValueError(f"{key}: its size and offsets disagree, or are not whole numbers")
    if data_start + end > total:
        raise UserError(f"{file}: ends before byte {data_start + end}; fetch it again")
    if end - begin != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"{key}: its size and offsets disagree")
    return StoredTensor(file, key, tuple(shape), dtype, data_start + begin)


def _check_places(tensors: list[StoredTensor], data_start: int, total: int) -> None:
    """Check the format's rule: the tensors fill the data without gaps or overlaps."""
    position = data_start
    for tensor in sorted(tensors, key=lambda tensor: (tensor.offset, tensor.size)):
        if tensor.offset != position:
            raise ValueError(f"{tensor.key} overlaps another tensor or follows a gap")
        position += tensor.size
    if position != total:
        raise ValueError(f"{total - position} bytes at the end do not belong to any tensor")


class _Digest:
    """SHA-256 of one tensor read by several readers: each waits for the rows before its own."""

    def __init__(self) -> None:
        self._sha256, self._next, self._failed = hashlib.sha256(), 0, False
        self._turn = threading.Condition()

    def update(self, start: int, stop: int, rows: np.ndarray) -> None:
        with self._turn:
            self._turn.wait_for(lambda: self._failed or self._next == start)
            self._sha256.update(rows.reshape(-1).view(np.uint8))  # type: ignore[arg-type]
            self._next = stop
            self._turn.notify_all()

    def fail(self) -> None:
        """Rows could not be read; release the readers waiting for them."""
        with self._turn:
            self._failed = True
            self._turn.notify_all()

    def hexdigest(self) -> str:
        return self._sha256.hexdigest()


@dataclass(frozen=True)
class _Read:
    """Rows of one tensor that this host reads at once, and the devices that receive columns of them."""

    tensor: StoredTensor
    start: int
    stop: int
    takers: tuple[tuple[jax.Device, tuple[slice, ...]], ...]
    sharding: NamedSharding  # of the whole array, which is complete after its last read
    is_last: bool
    digest: _Digest | None

    @property
    def size(self) -> int:
        return (self.stop - self.start) * self.tensor.row_bytes

    def parts(self, dtype: np.dtype) -> list[np.ndarray]:
        """Read the rows, and return each taker's part."""
        try:
            rows = self.tensor.rows(self.start, self.stop)
            if self.digest is not None:
                self.digest.update(self.start, self.stop, rows)
        except BaseException:
            if self.digest is not None:
                self.digest.fail()
            raise
        rows = rows.astype(dtype, copy=False)
        return [_contiguous(rows[(slice(None), *columns)]) for _, columns in self.takers]


def stream(
    wanted: Iterable[tuple[StoredTensor, NamedSharding]], dtype: str, hashes: list[str] | None = None
) -> Iterator[jax.Array]:
    """Yield the tensors in order, as arrays of this dtype.

    An array has the requested sharding, except that with several processes (which would read the same bytes)
    and for tensors larger than `WHOLE_BYTES` its rows are split over all devices of the mesh, if these divide
    them. Every process must request the same tensors in the same order.

    Args:
      hashes: receives the SHA-256 of each tensor's stored bytes, in order. Only for a single process, which
        reads whole tensors.
    """
    target = np.dtype(jnp.dtype(dtype))
    reads = (read for tensor, sharding in wanted for read in _reads(tensor, sharding, hashes is not None))
    waiting: deque[tuple[_Read, Future[list[np.ndarray]]]] = deque()
    ahead = 0
    pieces: list[jax.Array] = []
    with ThreadPoolExecutor(READERS) as pool:
        upcoming = next(reads, None)
        while upcoming or waiting:
            while upcoming and (not waiting or ahead + upcoming.size < AHEAD_BYTES):
                waiting.append((upcoming, pool.submit(upcoming.parts, target)))
                ahead += upcoming.size
                upcoming = next(reads, None)
            read, future = waiting.popleft()
            pieces += jax.device_put(future.result(), [device for device, _ in read.takers])
            ahead -= read.size
            del future
            if read.is_last:
                if hashes is not None and read.digest is not None:
                    hashes.append(read.digest.hexdigest())
                yield jax.make_array_from_single_device_arrays(read.tensor.shape, read.sharding, pieces)
                pieces = []


def _reads(tensor: StoredTensor, sharding: NamedSharding, hashed: bool = False) -> list[_Read]:
    """The reads of this host for one tensor, in row order."""
    mesh = sharding.mesh
    size = tensor.shape[0] * tensor.row_bytes
    if (jax.process_count() > 1 or size > WHOLE_BYTES) and tensor.shape[0] % mesh.size == 0:
        sharding = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    takers: dict[tuple[int, int], list[tuple[jax.Device, tuple[slice, ...]]]] = {}
    for device, index in sharding.addressable_devices_indices_map(tensor.shape).items():
        assert index is not None
        rows, *columns = index
        start, stop, _ = rows.indices(tensor.shape[0])
        takers.setdefault((start, stop), []).append((device, tuple(columns)))
    places = sorted(takers)
    digest = _Digest() if hashed else None
    return [
        _Read(tensor, start, stop, tuple(takers[start, stop]), sharding, (start, stop) == places[-1], digest)
        for start, stop in places
    ]
