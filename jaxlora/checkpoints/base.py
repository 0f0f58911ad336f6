"""Hugging Face checkpoints in and out, straight between the files and the stacked arrays.

    frozen = load_base("path/to/Qwen3-8B", spec, mesh)      # one or many *.safetensors
    save_merged("out", spec, merged, "path/to/Qwen3-8B")    # a checkpoint that Transformers loads

Each tensor is placed on the devices as soon as it is read, and every host reads its share of the files
once. Every key and every shape is checked, and anything left over is an error.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from functools import cache, partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from safetensors.numpy import save_file

from jaxlora.checkpoints.tensors import (
    HEADER_LIMIT,
    StoredTensor,
    file_size,
    open_tensors,
    read_bytes,
    stream,
)
from jaxlora.data.render import TOKENIZER_SUFFIXES
from jaxlora.lora import get_path, set_path
from jaxlora.models.decoder import ModelSpec, Tree
from jaxlora.models.table import Weight
from jaxlora.runtime.errors import UserError
from jaxlora.runtime.folders import file_in, new_folder
from jaxlora.runtime.progress import progress_bar
from jaxlora.runtime.remote import weight_files
from jaxlora.sharding import base_shardings, named

_SHARD_BYTES = 5 * 10**9


def load_base(directory: str | Path, spec: ModelSpec, mesh: Mesh) -> Tree:
    """The frozen base of a Hugging Face directory (local, a mirror, or an address such as
    `gs://bucket/folder`), in the spec's dtype and form.

    Raises:
      UserError: a file, key or shape is missing, wrong or left over.
    """
    stored = open_tensors(directory)
    tied_head = stored.pop("lm_head.weight", None) if spec.config.tie_word_embeddings else None
    if tied_head is not None:
        _check_tied(tied_head, stored.get("model.embed_tokens.weight"), directory)
    wanted = []
    for weight, key in _in_order(spec):
        tensor = stored.pop(key, None)
        if tensor is None:
            raise UserError(f"{directory}: no tensor {key}; the checkpoint is incomplete")
        if tensor.shape != weight.shape:
            raise UserError(
                f"{directory}: {key} has shape {tensor.shape}, config.json asks for {weight.shape}"
            )
        wanted.append((tensor, named(mesh, weight.axes, weight.shape)))
    if stored:
        names = ", ".join(sorted(stored)[:3])
        raise UserError(f"{directory}: {len(stored)} tensors that this model has no place for: {names}")
    return _build(spec, mesh, stream(wanted, spec.dtype), f"loading {Path(directory).name}")


def random_base(spec: ModelSpec, seed: int, mesh: Mesh, std: float = 0.02) -> Tree:
    """A base of random normal weights (norms are one), for benchmarks and tests; nothing is read."""

    @partial(jax.jit, static_argnums=(1, 2))
    def draw(key, shape, sharding):
        values = jax.random.normal(key, shape, jnp.dtype(spec.dtype)) * jnp.asarray(std, spec.dtype)
        return jax.lax.with_sharding_constraint(values, sharding)

    def arrays() -> Iterator[jax.Array]:
        n_drawn = 0
        for weight, _ in _in_order(spec):
            sharding = named(mesh, weight.axes, weight.shape)
            if len(weight.shape) == 1:
                yield jax.device_put(jnp.ones(weight.shape, spec.dtype), sharding)
            else:
                yield draw(jax.random.fold_in(jax.random.key(seed), n_drawn), weight.shape, sharding)
                n_drawn += 1

    return _build(spec, mesh, arrays(), "drawing random weights")


def _in_order(spec: ModelSpec) -> Iterator[tuple[Weight, str]]:
    """Each weight of each layer with its Hugging Face key, in the order in which `_build` takes them."""
    for weight in spec.table:
        for layer in range(spec.config.num_hidden_layers if weight.stacked else 1):
            yield weight, weight.hf_key.format(layer=layer)


def _build(spec: ModelSpec, mesh: Mesh, arrays: Iterator[jax.Array], title: str) -> Tree:
    """The frozen tree from one array a weight and layer; each is laid out over the mesh as it comes."""
    depth = spec.config.num_hidden_layers
    frozen: Tree = {}
    with progress_bar(title, sum(1 for _ in _in_order(spec)), "tensors") as advance:
        for weight in spec.table:
            sharding = named(mesh, weight.axes, weight.shape)
            if weight.stacked and spec.scan:
                shape = (depth, *weight.shape)
                whole = named(mesh, (None, *weight.axes), shape)
                stacked = jnp.zeros(shape, spec.dtype, device=whole)
                set_layer = _make_set_layer(whole, sharding)
                for i in range(depth):
                    # Waiting keeps the queue of layers on the devices short; reading goes on meanwhile.
                    stacked = jax.block_until_ready(set_layer(stacked, next(arrays), i))
                    advance(1)
                set_path(frozen, f"{weight.path}.weight", stacked)
            elif weight.stacked:
                for i in range(depth):
                    inner = frozen.setdefault("layers", {}).setdefault(i, {})
                    path = weight.path.removeprefix("layers.") + ".weight"
                    set_path(inner, path, _laid_out(next(arrays), sharding))
                    advance(1)
            else:
                set_path(frozen, f"{weight.path}.weight", _laid_out(next(arrays), sharding))
                advance(1)
    _check_tree(spec, frozen, mesh)
    return frozen


@cache
def _make_set_layer(stacked_sharding: NamedSharding, sharding: NamedSharding):
    """The jitted `(stacked, layer, i) -> stacked` with that layer set; it may come in another sharding."""

    def set_layer(stacked: jax.Array, layer: jax.Array, i: int) -> jax.Array:
        layer = jax.lax.with_sharding_constraint(layer, sharding)
        # As bits: on CPU, XLA would turn a bfloat16 update into a pass over all layers in float32.
        bits = jnp.dtype(f"uint{8 * stacked.dtype.itemsize}")
        places, values = (jax.lax.bitcast_convert_type(x, bits) for x in (stacked, layer))
        updated = jax.lax.dynamic_update_index_in_dim(places, values, i, 0)
        return jax.lax.bitcast_convert_type(updated, stacked.dtype)

    return jax.jit(set_layer, donate_argnums=0, out_shardings=stacked_sharding)


def _laid_out(array: jax.Array, sharding: NamedSharding) -> jax.Array:
    """The array with this sharding; chips exchange their parts where they hold others."""
    if array.sharding.is_equivalent_to(sharding, array.ndim):
        return array
    return jax.block_until_ready(_make_move(sharding)(array))


@cache
def _make_move(sharding: NamedSharding):
    return jax.jit(lambda x: x, out_shardings=sharding)


def _check_tree(spec: ModelSpec, frozen: Tree, mesh: Mesh) -> None:
    """The parameter table and the modules must agree on every path, shape and dtype; and on the layout."""
    ours = jax.tree.map(lambda x: (x.shape, x.dtype), frozen)
    modules = jax.tree.map(lambda x: (x.shape, x.dtype), spec.abstract_frozen)
    if ours != modules:
        raise AssertionError("the parameter table and the modules disagree")
    as_asked = jax.tree.map(
        lambda x, asked: x.sharding.is_equivalent_to(asked, x.ndim), frozen, base_shardings(mesh, spec)
    )
    if not all(jax.tree.leaves(as_asked)):
        raise AssertionError("a weight does not lie on the mesh as the table says")


def _check_tied(head: StoredTensor, embedding: StoredTensor | None, directory: str | Path) -> None:
    """A tied checkpoint may repeat the embedding as its head; a different head would be lost in silence."""
    same = embedding is not None and (head.shape, head.dtype) == (embedding.shape, embedding.dtype)
    if same and embedding is not None:
        starts = range(0, head.shape[0], 8192)
        ends = [min(start + 8192, head.shape[0]) for start in starts]
        same = all(
            np.array_equal(head.rows(i, j), embedding.rows(i, j)) for i, j in zip(starts, ends, strict=True)
        )
    if not same:
        raise UserError(
            f"{directory}: config.json ties the head, but lm_head.weight differs from the embedding"
        )


def save_merged(out: str | Path, spec: ModelSpec, frozen: Tree, source: str | Path) -> None:
    """Write a full checkpoint in shards with an index, with the source's config and tokenizer files.

    The folder appears whole or not at all.

    Raises:
      UserError: the folder exists already.
    """
    folder = Path(out)
    if folder.exists():
        raise UserError(f"{folder}: exists already; give a new folder")
    shards = _shards(spec, frozen)
    weight_map: dict[str, str] = {}
    with new_folder(folder) as staging:
        for i, tensors in enumerate(shards):
            name = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
            save_file(tensors, staging / name, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(tensors, name)
        total = sum(array.nbytes for tensors in shards for array in tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (staging / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
        for file in Path(source).iterdir():
            wanted = file.suffix in TOKENIZER_SUFFIXES and "safetensors" not in file.name
            if wanted and file.is_file():
                shutil.copy(file_in(source, file.name), staging / file.name)


def _shards(spec: ModelSpec, frozen: Tree) -> list[dict[str, np.ndarray]]:
    """The weights by Hugging Face key, in groups of the size of a file."""
    shards: list[dict[str, np.ndarray]] = [{}]
    size = 0
    for key, array in _tensors(spec, frozen):
        if size and size + array.nbytes > _SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][key] = array
        size += array.nbytes
    return shards


def _tensors(spec: ModelSpec, frozen: Tree) -> Iterator[tuple[str, np.ndarray]]:
    """Hugging Face key and host array of every weight."""
    for weight in spec.table:
        if not weight.stacked:
            yield weight.hf_key, np.asarray(get_path(frozen, weight.path)["weight"])
            continue
        for i in range(spec.config.num_hidden_layers):
            if spec.scan:
                array = get_path(frozen, weight.path)["weight"][i]
            else:
                array = get_path(frozen["layers"][i], weight.path.removeprefix("layers."))["weight"]
            yield weight.hf_key.format(layer=i), np.asarray(array)


def fingerprint(directory: str | Path) -> str:
    """A hash that tells one base from another without reading its weights twice.

    SHA-256 over `config.json` and, for each safetensors file, its name, size and header, and the first and
    last 64 KiB of its tensors.
    """
    digest = hashlib.sha256()
    digest.update((Path(directory) / "config.json").read_bytes())
    for file in weight_files(directory):
        size = file_size(file)
        digest.update(f"{Path(file).name}\0{size}\0".encode())
        start = min(8, size)
        header = int.from_bytes(read_bytes(file, 0, start).tobytes(), "little")
        length = min(header, size, HEADER_LIMIT) + 65536
        digest.update(read_bytes(file, start, min(length, size - start)).tobytes())
        tail = min(size, 65536)
        digest.update(read_bytes(file, size - tail, tail).tobytes())
    return digest.hexdigest()
