"""Hugging Face checkpoints in and out, straight between the files and the stacked arrays.

    frozen = load_base("path/to/Qwen3-8B", spec, mesh)      # one or many *.safetensors
    save_merged("out", spec, merged, "path/to/Qwen3-8B")    # a checkpoint that Transformers loads

Files are memory-mapped; each tensor is placed on the devices as soon as it is read, and a device reads only
its own part. Every key and every shape is checked, and anything left over is an error.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from jaxlora.errors import UserError
from jaxlora.lora import get_path, set_path
from jaxlora.models.parameters import Weight
from jaxlora.models.qwen3 import ModelSpec, Tree
from jaxlora.progress import progress_bar
from jaxlora.sharding import named

_SHARD_BYTES = 5 * 10**9


def load_base(directory: str | Path, spec: ModelSpec, mesh: Mesh) -> Tree:
    """The frozen base of a Hugging Face directory, in the spec's dtype and form.

    Raises:
      UserError: a file, key or shape is missing, wrong or left over.
    """
    with ExitStack() as stack:
        slices = _open(Path(directory), stack)
        tied_head = slices.pop("lm_head.weight", None) if spec.config.tie_word_embeddings else None
        if tied_head is not None:
            _check_tied(tied_head, slices.get("model.embed_tokens.weight"), directory)

        def read(weight: Weight, key: str, sharding: NamedSharding) -> jax.Array:
            source = slices.pop(key, None)
            if source is None:
                raise UserError(f"{directory}: no tensor {key}; the checkpoint is incomplete")
            shape = tuple(source.get_shape())
            if shape != weight.shape:
                raise UserError(f"{directory}: {key} has shape {shape}, config.json asks for {weight.shape}")
            dtype = np.dtype(jnp.dtype(spec.dtype))
            return jax.make_array_from_callback(
                shape, sharding, lambda index: np.asarray(source[index]).astype(dtype, copy=False)
            )

        frozen = _build(spec, mesh, read, f"loading {Path(directory).name}")
        if slices:
            names = ", ".join(sorted(slices)[:3])
            raise UserError(f"{directory}: {len(slices)} tensors that this model has no place for: {names}")
    return frozen


def random_base(spec: ModelSpec, seed: int, mesh: Mesh, std: float = 0.02) -> Tree:
    """A base of random normal weights (norms are one), for benchmarks and tests; nothing is read."""

    @partial(jax.jit, static_argnums=(1, 2))
    def draw(key, shape, sharding):
        values = jax.random.normal(key, shape, jnp.dtype(spec.dtype)) * jnp.asarray(std, spec.dtype)
        return jax.lax.with_sharding_constraint(values, sharding)

    keys = (jax.random.fold_in(jax.random.key(seed), i) for i in range(1 << 30))

    def read(weight: Weight, key: str, sharding: NamedSharding) -> jax.Array:
        if len(weight.shape) == 1:
            return jax.device_put(jnp.ones(weight.shape, spec.dtype), sharding)
        return draw(next(keys), weight.shape, sharding)

    return _build(spec, mesh, read, "drawing random weights")


def _build(spec: ModelSpec, mesh: Mesh, read: Callable[..., jax.Array], title: str) -> Tree:
    """The frozen tree from `read(weight, hf_key, sharding)`, layer by layer into the stacked arrays."""
    depth = spec.config.num_hidden_layers
    frozen: Tree = {}
    set_layer = jax.jit(jax.lax.dynamic_update_index_in_dim, static_argnums=3, donate_argnums=0)
    n_tensors = sum(depth if weight.stacked else 1 for weight in spec.table)
    with progress_bar(title, n_tensors, "tensors") as advance:
        for weight in spec.table:
            sharding = named(mesh, weight.axes, weight.shape)
            if not weight.stacked:
                set_path(frozen, f"{weight.path}.weight", read(weight, weight.hf_key, sharding))
                advance(1)
                continue
            stacked = None
            if spec.scan:
                whole = named(mesh, (None, *weight.axes), (depth, *weight.shape))
                stacked = jax.jit(
                    partial(jnp.zeros, (depth, *weight.shape), spec.dtype), out_shardings=whole
                )()
            for i in range(depth):
                layer = read(weight, weight.hf_key.format(layer=i), sharding)
                if spec.scan:
                    stacked = set_layer(stacked, layer, i, 0)
                else:
                    inner = frozen.setdefault("layers", {}).setdefault(i, {})
                    set_path(inner, weight.path.removeprefix("layers.") + ".weight", layer)
                advance(1)
            if spec.scan:
                set_path(frozen, f"{weight.path}.weight", stacked)
    _check_tree(spec, frozen)
    return frozen


def _check_tree(spec: ModelSpec, frozen: Tree) -> None:
    """The parameter table and the modules must agree on every path, shape and dtype."""
    ours = jax.tree.map(lambda x: (x.shape, x.dtype), frozen)
    modules = jax.tree.map(lambda x: (x.shape, x.dtype), spec.abstract_frozen)
    if ours != modules:
        raise AssertionError("the parameter table and the modules disagree")


def _open(directory: Path, stack: ExitStack) -> dict[str, Any]:
    """Every tensor of the directory's safetensors files, as slices that read on indexing."""
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        try:
            listed = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            names = sorted(set(listed.values()))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise UserError(f"{index}: not a safetensors index: {error}") from None
    else:
        listed, names = None, ["model.safetensors"]
    slices: dict[str, Any] = {}
    for name in names:
        file = directory / str(name)
        if Path(str(name)).name != name or not file.is_file():
            raise UserError(f"{file}: missing; the directory must hold model.safetensors or its indexed parts")
        try:
            handle = stack.enter_context(safe_open(file, framework="np"))
        except (SafetensorError, OSError) as error:
            raise UserError(f"{file}: not a readable safetensors file: {error}") from None
        for key in handle.keys():  # noqa: SIM118 (not a mapping)
            if key in slices:
                raise UserError(f"{file}: {key} is stored twice")
            slices[key] = handle.get_slice(key)
    if listed is not None and set(listed) != set(slices):
        odd = sorted(set(listed) ^ set(slices))[:3]
        raise UserError(f"{index}: the index and the files disagree about {', '.join(odd)}")
    return slices


def _check_tied(head: Any, embedding: Any, directory: str | Path) -> None:
    """A tied checkpoint may repeat the embedding as its head; a different head would be lost in silence."""
    if embedding is None or head.get_shape() != embedding.get_shape():
        same = False
    else:
        rows = head.get_shape()[0]
        same = all(
            np.array_equal(head[i : i + 8192], embedding[i : i + 8192]) for i in range(0, rows, 8192)
        )
    if not same:
        raise UserError(f"{directory}: config.json ties the head, but lm_head.weight differs from the embedding")


def save_merged(out: str | Path, spec: ModelSpec, frozen: Tree, source: str | Path) -> None:
    """Write a full checkpoint in shards with an index, with the source's config and tokenizer files.

    Raises:
      UserError: the folder exists already.
    """
    folder = Path(out)
    if folder.exists():
        raise UserError(f"{folder}: exists already; give a new folder")
    partial_folder = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial_folder, ignore_errors=True)
    partial_folder.mkdir(parents=True)
    shards: list[dict[str, np.ndarray]] = [{}]
    size = 0
    for key, array in _tensors(spec, frozen):
        if size and size + array.nbytes > _SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][key] = array
        size += array.nbytes
    weight_map = {}
    for i, tensors in enumerate(shards):
        name = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        save_file(tensors, partial_folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, name)
    total = sum(array.nbytes for tensors in shards for array in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (partial_folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    for file in Path(source).iterdir():
        if file.suffix in {".json", ".jinja", ".txt", ".model"} and "safetensors" not in file.name:
            shutil.copy(file, partial_folder / file.name)
    partial_folder.rename(folder)


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
