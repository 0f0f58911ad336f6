"""Reads tensors of safetensors files onto a mesh, by byte ranges, several at once.

    tensors = open_tensors("gs://bucket/Qwen3-8B")          # or a local directory
    for array in stream(tensors, ["model.norm.weight"], dtype, mesh): ...

Each device reads one contiguous band of a tensor's rows; the caller's jitted function then lays the array
out as it likes, so that chips exchange their parts over the interconnect and every host reads its share of
the file once. What is read ahead is bounded, and nothing is kept on the host.
"""

from __future__ import annotations

import json
import math
import os
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxlora.errors import UserError

READERS = 8  # threads; a bucket needs several requests in flight, a disk at least two
AHEAD_BYTES = 256 * 2**20  # read ahead of placement, on one host
HEADER_LIMIT = 100 * 2**20  # the format's own limit
_DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies."""

    file: str
    key: str
    shape: tuple[int, ...]
    dtype: np.dtype
    offset: int  # of its first byte in the file

    @property
    def row_bytes(self) -> int:
        return math.prod(self.shape[1:]) * self.dtype.itemsize

    def rows(self, start: int, stop: int) -> np.ndarray:
        """Rows `[stop - start, ...]`, read now."""
        begin, size = self.offset + start * self.row_bytes, (stop - start) * self.row_bytes
        return read_bytes(self.file, begin, size).view(self.dtype).reshape(stop - start, *self.shape[1:])


def read_bytes(path: str, start: int, size: int) -> np.ndarray:
    """Exactly these bytes of a local file or of an address such as `gs://bucket/file`, uint8 `[size]`.

    Raises:
      UserError: the file is missing, unreadable or too short.
    """
    try:
        if "://" in path:
            filesystem, name = _remote(path)
            data = np.frombuffer(filesystem.cat_file(name, start=start, end=start + size), np.uint8)
        else:
            data = _read_local(path, start, size)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    if len(data) != size:
        raise UserError(f"{path}: ends before byte {start + size}; fetch it again")
    return data


def _read_local(path: str, start: int, size: int) -> np.ndarray:
    """Plain reads: a memory map would count every page it touched as this process' memory."""
    buffer = np.empty(size, np.uint8)
    view, done = memoryview(buffer), 0
    handle = os.open(path, os.O_RDONLY)
    try:
        while done < size and (n := os.preadv(handle, [view[done:]], start + done)):
            done += n
    finally:
        os.close(handle)
    return buffer[:done]


def _remote(path: str) -> tuple[Any, str]:
    import fsspec

    try:
        return fsspec.core.url_to_fs(path)
    except ImportError as error:
        raise UserError(f"{path}: {error}; for gs:// run `pip install gcsfs`") from None


def exists(path: str) -> bool:
    """Whether a local file or an address is there."""
    if "://" not in path:
        return os.path.isfile(path)
    filesystem, name = _remote(path)
    return bool(filesystem.isfile(name))


def _size(path: str) -> int:
    if "://" not in path:
        return os.path.getsize(path)
    filesystem, name = _remote(path)
    return int(filesystem.size(name))


def open_tensors(directory: str) -> dict[str, StoredTensor]:
    """Every tensor of a directory's safetensors files, from the files' headers alone.

    Raises:
      UserError: a file is missing or damaged, or the index and the files disagree.
    """
    index, listed, names = f"{directory}/model.safetensors.index.json", None, ["model.safetensors"]
    if exists(index):
        try:
            listed = json.loads(read_bytes(index, 0, _size(index)).tobytes())["weight_map"]
            names = sorted(set(listed.values()))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise UserError(f"{index}: not a safetensors index: {error}") from None
    tensors: dict[str, StoredTensor] = {}
    for name in names:
        file = f"{directory}/{name}"
        if os.path.basename(str(name)) != name or not exists(file):
            raise UserError(
                f"{file}: missing; the directory must hold model.safetensors or its indexed parts"
            )
        for tensor in read_header(file):
            if tensor.key in tensors:
                raise UserError(f"{file}: {tensor.key} is stored twice")
            tensors[tensor.key] = tensor
    if listed is not None and set(listed) != set(tensors):
        odd = sorted(set(listed) ^ set(tensors))[:3]
        raise UserError(f"{index}: the index and the files disagree about {', '.join(odd)}")
    return tensors


def read_header(file: str) -> list[StoredTensor]:
    """The tensors of one file: 8 bytes of header length, a JSON header, then the data.

    Raises:
      UserError: not a safetensors file, a damaged one, or a dtype that no base is stored in.
    """
    total = _size(file)
    length = int.from_bytes(read_bytes(file, 0, min(8, total)).tobytes(), "little")
    if total < 8 or length > min(HEADER_LIMIT, total - 8):
        raise UserError(f"{file}: not a readable safetensors file: no valid header")
    try:
        header = json.loads(read_bytes(file, 8, length).tobytes())
        entries = {key: entry for key, entry in header.items() if key != "__metadata__"}
        return [_stored(file, key, entry, 8 + length, total) for key, entry in entries.items()]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{file}: not a readable safetensors file: {error}") from None


def _stored(file: str, key: str, entry: dict[str, Any], data_start: int, total: int) -> StoredTensor:
    if entry["dtype"] not in _DTYPES:
        raise UserError(
            f"{file}: {key} is stored as {entry['dtype']}; only {', '.join(_DTYPES)} are supported"
        )
    dtype = np.dtype(jnp.dtype(_DTYPES[entry["dtype"]]))
    shape = tuple(int(n) for n in entry["shape"])
    begin, end = (int(n) for n in entry["data_offsets"])
    if min(shape, default=1) < 0 or end - begin != math.prod(shape) * dtype.itemsize or begin < 0:
        raise ValueError(f"{key}: its size and its place disagree")
    if data_start + end > total:
        raise UserError(f"{file}: ends before byte {data_start + end}; fetch it again")
    return StoredTensor(file, key, shape, dtype, data_start + begin)


@dataclass(frozen=True)
class _Band:
    """Rows of one tensor that one device of this host reads."""

    tensor: StoredTensor
    device: jax.Device
    start: int
    stop: int
    sharding: NamedSharding
    is_last: bool


def stream(tensors: Iterable[StoredTensor], dtype: str, mesh: Mesh) -> Iterator[jax.Array]:
    """The tensors in order, as arrays of this dtype whose rows are split over all devices of the mesh.

    Every process must ask for the same tensors in the same order.
    """
    target = np.dtype(jnp.dtype(dtype))
    bands = (band for tensor in tensors for band in _bands(tensor, mesh))
    waiting: deque[tuple[_Band, int, Future]] = deque()
    ahead, parts = 0, []

    def read(band: _Band) -> np.ndarray:
        return band.tensor.rows(band.start, band.stop).astype(target, copy=False)

    with ThreadPoolExecutor(READERS) as pool:
        upcoming = next(bands, None)
        while upcoming or waiting:
            while upcoming and (not waiting or ahead < AHEAD_BYTES):
                size = (upcoming.stop - upcoming.start) * upcoming.tensor.row_bytes
                waiting.append((upcoming, size, pool.submit(read, upcoming)))
                ahead += size
                upcoming = next(bands, None)
            band, size, future = waiting.popleft()
            parts.append(jax.device_put(future.result(), band.device))
            ahead -= size
            if band.is_last:
                yield jax.make_array_from_single_device_arrays(band.tensor.shape, band.sharding, parts)
                parts = []


def _bands(tensor: StoredTensor, mesh: Mesh) -> list[_Band]:
    split = tensor.shape and tensor.shape[0] % mesh.size == 0
    sharding = NamedSharding(mesh, PartitionSpec(mesh.axis_names) if split else PartitionSpec())
    places = sharding.addressable_devices_indices_map(tensor.shape)
    bands = []
    for i, (device, index) in enumerate(places.items()):
        start, stop, _ = index[0].indices(tensor.shape[0])  # type: ignore[index]
        bands.append(_Band(tensor, device, start, stop, sharding, i == len(places) - 1))
    return bands
