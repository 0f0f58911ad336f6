"""The base model: finding, fingerprinting, loading or randomly drawing it, and writing a full checkpoint.

    base = find_base(config.model, seed=0)               # a directory, a Hub name, gs://, embedded:base
    frozen = base.load(spec, mesh)                       # one or more *.safetensors, or random weights
    save_model("out", spec, weights, base.folder)        # a checkpoint that Transformers can load

Each tensor is placed on the devices as soon as it is read, and every host reads its share of the files once.
Every key and shape is checked, and any tensor left over is an error.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from safetensors.numpy import save_file

from jaxlora.checkpoints.experts import check_layout, take
from jaxlora.checkpoints.tensors import (
    HEADER_LIMIT,
    INDEX,
    SINGLE,
    StoredTensor,
    exists,
    file_size,
    loaded_files,
    open_tensors,
    read_bytes,
    stale_index,
    stream,
)
from jaxlora.config import ModelSource
from jaxlora.data.render import Tokenizer, chat_text, encode_texts, largest_token_id, load_tokenizer
from jaxlora.data.template import facts
from jaxlora.lora import get_path, set_path
from jaxlora.models.decoder import ModelSpec, Tree
from jaxlora.models.families import load_model_config, published_config
from jaxlora.models.quantised import Scheme, quantise
from jaxlora.models.spec import ModelConfig, Weight
from jaxlora.runtime import hosts
from jaxlora.runtime.errors import UserError
from jaxlora.runtime.files import read_json, read_object, sha256_of
from jaxlora.runtime.folders import claimed, file_in, new_folder
from jaxlora.runtime.progress import console, progress_bar
from jaxlora.runtime.remote import TOKENIZER_SUFFIXES, fetch_folder, is_remote, mirror, resolve, weight_files
from jaxlora.sharding import base_shardings, exchanged, named, weight_shardings

_SHARD_BYTES = 5 * 10**9
GENERATION = "generation_config.json"
_CONFIG = "tokenizer_config.json"
_MARK = "answer-of-the-assistant"


@dataclass(frozen=True)
class Base:
    """A base that was found: its location and shape, without weights."""

    source: ModelSource
    folder: Path | None  # None: only a published shape, without files
    config: ModelConfig
    seed: int  # for random weights
    _seen: dict[str, str] = field(default_factory=dict, compare=False, repr=False)

    @property
    def is_drawn(self) -> bool:
        """Whether its weights are drawn at random."""
        return self.folder is None or self.source.random_weights

    @property
    def has_weights(self) -> bool:
        """Whether its weights are available: a plan fetches none."""
        return self.is_drawn or bool(weight_files(self.folder or ""))

    def fingerprint(self) -> str:
        """Identifies the base, by its files or, if it is drawn at random, by seed and shape."""
        if self.folder is None or self.is_drawn:
            return f"random-{self.seed}-{hashlib.sha256(_shape_text(self.config).encode()).hexdigest()[:16]}"
        return fingerprint(self.folder)

    def load(self, spec: ModelSpec, mesh: Mesh, expected: str | None = None) -> Tree:
        """Load its weights in the spec's dtype and form, sharded over the mesh and hashed as they are read.

        Args:
          expected: the recorded `weights_sha256`, compared if the present one is known.

        Raises:
          UserError: the files cannot be used, or are not the recorded ones.
        """
        if self.folder is None or self.is_drawn:
            return random_base(spec, self.seed, mesh)
        tree, found = load_hashed(self.folder, spec, mesh)
        if found is not None:
            self._seen["weights"] = found
        if expected is not None and found not in (None, expected):
            raise UserError(
                f"{self.folder}: its weights are not those of the run (their SHA-256 differs);"
                " fetch them again"
            )
        return tree

    @property
    def weights_sha256(self) -> str | None:
        """SHA-256 over all weights, once loaded: unlike the fingerprint, it covers every bit.

        None before loading, for a base drawn at random, and on several hosts, as each reads only a part.
        """
        return self._seen.get("weights")

    def stop_ids(self, tokenizer: Tokenizer) -> tuple[int, ...]:
        """Every token that ends an answer: the end of turn that the template writes after an assistant turn
        (which training teaches), the tokenizer's, and those of `generation_config.json` and `config.json`.

        Raises:
          UserError: there is none.
        """
        own = [end_of_turn(tokenizer), tokenizer.eos_token_id]
        generation = {}
        if self.folder is not None and (self.folder / GENERATION).is_file():
            generation = read_object(file_in(self.folder, GENERATION))
        eos = generation.get("eos_token_id")
        own += eos if isinstance(eos, list) else [eos]
        known = range(self.config.vocab_size)
        found = dict.fromkeys(token for token in (*own, *self.config.eos_token_ids) if token is not None)
        if odd := [token for token in found if type(token) is not int or token not in known]:
            raise UserError(f"{self.folder}: eos_token_id {odd[0]!r:.80} is not a token of the model")
        if not found:
            raise UserError(
                "config.model.tokenizer: neither the tokenizer nor the model names an end-of-turn token"
            )
        return tuple(found)

    def tokenizer(self, chat: bool = True) -> Tokenizer:
        """The tokenizer named by the configuration, or the model's own; the model must cover all its ids.

        Raises:
          UserError: there is none, or it has ids outside the model's vocabulary.
        """
        name = self.source.tokenizer or (str(self.folder) if self.folder else None)
        if name is None:
            raise UserError("config.model.tokenizer: a random model has no tokenizer; name one")
        tokenizer = load_tokenizer(name, chat)
        largest, known = largest_token_id(tokenizer), self.config.vocab_size
        if largest >= known:
            raise UserError(
                f"config.model.tokenizer: it produces ids up to {largest}, but the model has only {known}"
                " tokens"
            )
        return tokenizer

    def tokenizer_folder(self) -> Path | None:
        """The folder of that tokenizer's files; None if there is no tokenizer."""
        return self.folder if self.source.tokenizer is None else tokenizer_folder(self.source.tokenizer)


def _shape_text(config: ModelConfig) -> str:
    """A model's shape as text; without RoPE scaling it is as it was before that existed, for older runs."""
    return repr(config).replace(", experts=None)", ")").replace(", rope_scaling=None)", ")")


def end_of_turn(tokenizer: Tokenizer) -> int | None:
    """The token that the chat template writes after an assistant turn, if any."""
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": _MARK}]
    try:
        after = chat_text(tokenizer, turns, generation_prompt=False).rpartition(_MARK)[2]
    except UserError:
        return None
    added = set(tokenizer.added_tokens_decoder)
    return next((token for token in encode_texts(tokenizer, [after])[0] if token in added), None)


def tokenizer_folder(name: str | Path) -> Path:
    """The local folder of a tokenizer's files: a directory, `embedded:NAME`, an address, or a Hub name.

    Raises:
      UserError: there is none.
    """
    if is_remote(name):
        return mirror(str(name))
    folder = resolve(str(name))
    if folder.is_dir():
        return folder
    if str(name).count("/") != 1 or str(name).startswith((".", "/", "~")):
        raise UserError(f"tokenizer {str(name)!r}: no such directory; give one, or a Hub name")

    def missing(fetched: Path) -> str:
        return "" if (fetched / _CONFIG).is_file() else f"{fetched / _CONFIG}: missing"

    return fetch_folder(f"config.model.tokenizer: {str(name)!r}", str(name), TOKENIZER_FILES, missing)


def tokenizer_sha256(tokenizer: Tokenizer | str | Path) -> str:
    """A hash of everything that turns text into tokens: the tokenizer's files, its chat template, and what
    `template` adds (the date, the first token).

    The order of JSON keys, white space between them and which file holds the template do not matter.

    Args:
      tokenizer: a loaded one, or its location as for `load_tokenizer`.

    Raises:
      UserError: there is none, or its files cannot be read.
    """
    if isinstance(tokenizer, str | Path):
        tokenizer = load_tokenizer(tokenizer, chat=False)
    # A tokenizer created in memory has no folder.
    folder = tokenizer_folder(tokenizer.name_or_path) if tokenizer.name_or_path else None
    parts: dict[str, Any] = {"template": tokenizer.chat_template, **facts(tokenizer)}
    if folder is None or not (folder / "tokenizer.json").is_file():
        parts["vocabulary"] = sorted(tokenizer.get_vocab().items())
        parts["special"] = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    for name in ("tokenizer.json", _CONFIG, "special_tokens_map.json", "added_tokens.json"):
        if folder is not None and (folder / name).is_file():
            parts[name] = read_json(file_in(folder, name))
    if isinstance(parts.get(_CONFIG), dict):
        parts[_CONFIG].pop("chat_template", None)
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def find_base(source: ModelSource, seed: int = 0, with_weights: bool = True) -> Base:
    """Find the base of a configuration. A Hub model is fetched (with a message) and cached; of a model in a
    bucket (`gs://bucket/folder`) only the small files are copied, see `jaxlora.runtime.remote`.

    Args:
      seed: for random weights.
      with_weights: also fetch the weights; otherwise only config.json (for plans).

    Raises:
      UserError: there is no such directory or Hub model, or its family is not supported.
    """
    if source.random_weights and not Path(source.path).exists():
        published = None
        with suppress(UserError):
            published = published_config(source.path)
        if published is not None:
            return _checked(Base(source, None, published, seed))
    folder = mirror(source.path) if is_remote(source.path) else resolve(source.path)
    if not folder.is_dir():
        folder = _fetch(source, with_weights and not source.random_weights)
    return _checked(Base(source, folder, load_model_config(folder), seed))


def _checked(base: Base) -> Base:
    if base.config.experts and base.source.base_dtype not in (None, "bfloat16"):
        raise UserError(
            f"config.model.base_dtype: {base.source.base_dtype}: experts are not rounded; leave it out"
        )
    return base


def _fetch(source: ModelSource, with_weights: bool) -> Path:
    """The local folder of a Hub model."""
    name = source.path
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise UserError(
            f"config.model.path: no directory {name!r}; give one, or a Hub name such as Qwen/Qwen3-8B"
        )
    patterns = [f"*{suffix}" for suffix in sorted(TOKENIZER_SUFFIXES)] + ["*.safetensors"] * with_weights
    missing = partial(_missing, with_weights=with_weights, with_tokenizer=source.tokenizer is None)
    return fetch_folder(f"config.model.path: {name!r}", name, patterns, missing)


def _missing(folder: Path, with_weights: bool, with_tokenizer: bool) -> str:
    """What is missing from a model's folder, in words; empty if nothing is."""
    for name in ["config.json"] + ["tokenizer_config.json"] * with_tokenizer:
        if not (folder / name).is_file():
            return f"{folder / name}: missing"
    try:
        if with_weights:
            open_tensors(folder)
    except UserError as error:
        return str(error)
    return ""


def load_base(directory: str | Path, spec: ModelSpec, mesh: Mesh) -> Tree:
    """Load the frozen base from a Hugging Face directory (local, a mirror, or an address such as
    `gs://bucket/folder`), in the spec's dtype and form.

    Raises:
      UserError: a file, key or shape is missing, wrong or left over.
    """
    return load_hashed(directory, spec, mesh)[0]


def load_hashed(directory: str | Path, spec: ModelSpec, mesh: Mesh) -> tuple[Tree, str | None]:
    """Like `load_base`, with a SHA-256 over every weight's key, shape and bytes (several processes: None).

    The hash does not depend on the order of reading, the devices, or how weights are spread over files.
    """
    if stale_index(directory):
        console.print(f"{directory}: loading {SINGLE}; ignoring {INDEX} beside it", markup=False)
    stored = open_tensors(directory)
    tied_head = stored.pop("lm_head.weight", None) if spec.config.tie_word_embeddings else None
    if tied_head is not None:  # if only the head is stored, it is also the embedding
        _check_tied(tied_head, stored.setdefault("model.embed_tokens.weight", tied_head), directory)
    wanted = []
    check_layout(stored, directory)
    for weight, key in _in_order(spec):
        tensor = take(stored, weight, key, directory)
        if tensor.shape != weight.shape:
            raise UserError(
                f"{directory}: {key} has shape {tensor.shape}, config.json asks for {weight.shape}"
            )
        wanted.append((tensor, named(mesh, weight.axes, weight.shape)))
    if stored:
        names = ", ".join(sorted(stored)[:3])
        raise UserError(f"{directory}: {len(stored)} tensors that do not belong to this model: {names}")
    hashes: list[str] | None = [] if jax.process_count() == 1 else None
    tree = _build(spec, mesh, stream(wanted, spec.dtype, hashes), f"loading {Path(directory).name}")
    if hashes is None:
        return tree, None
    keys = [key for _, key in _in_order(spec)]
    facts = [
        [key, tensor.shape, tensor.dtype.name, sha256]
        for key, (tensor, _), sha256 in zip(keys, wanted, hashes, strict=True)
    ]
    return tree, hashlib.sha256(json.dumps(sorted(facts)).encode()).hexdigest()


def random_base(spec: ModelSpec, seed: int, mesh: Mesh, std: float = 0.02) -> Tree:
    """A base with random normal weights (norms are one) for benchmarks and tests; nothing is read."""

    @partial(jax.jit, static_argnums=(1, 2))
    def draw(key, shape, sharding):
        values = jax.random.normal(key, shape, jnp.dtype(spec.dtype)) * jnp.asarray(std, spec.dtype)
        return jax.lax.with_sharding_constraint(values, sharding)

    def arrays() -> Iterator[jax.Array]:
        n_drawn = 0
        for weight, _ in _in_order(spec):
            sharding = named(mesh, weight.axes, weight.shape)
            if len(weight.shape) == 1 and weight.array == "weight":  # a norm
                yield jax.device_put(jnp.ones(weight.shape, spec.dtype), sharding)
            else:
                yield draw(jax.random.fold_in(jax.random.key(seed), n_drawn), weight.shape, sharding)
                n_drawn += 1

    return _build(spec, mesh, arrays(), "drawing random weights")


def _in_order(spec: ModelSpec) -> Iterator[tuple[Weight, str]]:
    """Yield each weight of each layer with its Hugging Face key, in the order in which `_build` takes them.

    Keys of experts keep their `{expert}`: the tensors of all experts are read as one.
    """
    for weight in spec.table:
        for layer in range(spec.config.num_hidden_layers if weight.stacked else 1):
            yield weight, weight.hf_key.format(layer=layer, expert="{expert}")


def _build(spec: ModelSpec, mesh: Mesh, arrays: Iterator[jax.Array], title: str) -> Tree:
    """Build the frozen tree from one array per weight and layer; each is quantised, if the spec says so, and
    sharded over the mesh as it arrives."""
    depth = spec.config.num_hidden_layers
    frozen: Tree = {}
    with progress_bar(title, sum(1 for _ in _in_order(spec)), "tensors") as advance:
        for weight in spec.table:
            kept = _Kept(spec.scheme_of(weight), jnp.dtype(spec.dtype), weight)
            sharding = weight_shardings(mesh, weight.axes, kept.shapes)
            if weight.stacked and spec.scan:
                shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct((depth, *x.shape), x.dtype), kept.shapes)
                whole = weight_shardings(mesh, weight.axes, shapes)
                stacked = jax.tree.map(lambda x, s: jnp.zeros(x.shape, x.dtype, device=s), shapes, whole)
                set_layer = _make_set_layer(whole, sharding)
                for i in range(depth):
                    # Waiting keeps the device queue of layers short; reading continues meanwhile.
                    stacked = jax.block_until_ready(set_layer(stacked, kept.of(next(arrays)), i))
                    advance(1)
                set_path(frozen, weight.place, stacked)
            elif weight.stacked:
                for i in range(depth):
                    inner = frozen.setdefault("layers", {}).setdefault(i, {})
                    path = weight.place.removeprefix("layers.")
                    set_path(inner, path, _laid_out(kept.of(next(arrays)), sharding))
                    advance(1)
            else:
                set_path(frozen, weight.place, _laid_out(kept.of(next(arrays)), sharding))
                advance(1)
    _check_tree(spec, frozen, mesh)
    return frozen


@dataclass(frozen=True)
class _Kept:
    """The form in which one weight of the base is kept."""

    scheme: Scheme | None
    dtype: np.dtype
    weight: Weight

    @property
    def shapes(self) -> Any:
        """The shape of its array, or the shapes of the arrays of a quantised weight."""
        return jax.eval_shape(self._form, jax.ShapeDtypeStruct(self.weight.shape, self.dtype))

    def of(self, array: jax.Array) -> Any:
        """The weight of one layer in this form; waits, so that few unrounded ones are in memory at once."""
        return array if self.scheme is None else jax.block_until_ready(_quantise(self.scheme, array))

    def _form(self, array: jax.Array) -> Any:
        return array if self.scheme is None else quantise(self.scheme, array)


_quantise = jax.jit(quantise, static_argnums=0)


@cache
def _make_set_layer(stacked_sharding: Any, sharding: Any):
    """The jitted `(stacked, layer, i) -> stacked` that sets a layer, which may have another sharding."""

    def set_one(i: int, stacked: jax.Array, layer: jax.Array, sharding: NamedSharding) -> jax.Array:
        layer = jax.lax.with_sharding_constraint(layer, sharding)
        # As bits: on CPUs, XLA would turn a bfloat16 update into a float32 pass over all layers.
        bits = jnp.dtype(f"uint{8 * stacked.dtype.itemsize}")
        places, values = (jax.lax.bitcast_convert_type(x, bits) for x in (stacked, layer))
        updated = jax.lax.dynamic_update_index_in_dim(places, values, i, 0)
        return jax.lax.bitcast_convert_type(updated, stacked.dtype)

    def set_layer(stacked: Any, layer: Any, i: int) -> Any:
        return jax.tree.map(partial(set_one, i), stacked, layer, sharding)

    return jax.jit(set_layer, donate_argnums=0, out_shardings=stacked_sharding)


def _laid_out(weight: Any, sharding: Any) -> Any:
    """The weight with this sharding; chips exchange parts as needed."""
    return jax.tree.map(_moved, weight, sharding)


def _moved(array: jax.Array, sharding: NamedSharding) -> jax.Array:
    if array.sharding.is_equivalent_to(sharding, array.ndim):
        return array
    return exchanged(array, sharding)


def _check_tree(spec: ModelSpec, frozen: Tree, mesh: Mesh) -> None:
    """Check that parameter table and modules agree on every path, shape and dtype, and on the sharding."""
    ours = jax.tree.map(lambda x: (x.shape, x.dtype), frozen)
    modules = jax.tree.map(lambda x: (x.shape, x.dtype), spec.abstract_base)
    if ours != modules:
        raise AssertionError("the parameter table and the modules disagree")
    as_asked = jax.tree.map(
        lambda x, asked: x.sharding.is_equivalent_to(asked, x.ndim), frozen, base_shardings(mesh, spec)
    )
    if not all(jax.tree.leaves(as_asked)):
        raise AssertionError("a weight does not lie on the mesh as the table says")


def _check_tied(head: StoredTensor, embedding: StoredTensor, directory: str | Path) -> None:
    """A tied checkpoint may store the embedding again as its head; another head would be lost silently."""
    same = (head.shape, head.dtype) == (embedding.shape, embedding.dtype)
    if same and head != embedding:
        starts = range(0, head.shape[0], 8192)
        ends = [min(start + 8192, head.shape[0]) for start in starts]
        same = all(
            np.array_equal(head.rows(i, j), embedding.rows(i, j)) for i, j in zip(starts, ends, strict=True)
        )
    if not same:
        raise UserError(
            f"{directory}: config.json ties the head, but lm_head.weight differs from the embedding"
        )


def save_model(
    out: str | Path,
    spec: ModelSpec,
    weights: Tree,
    source: str | Path,
    tokenizer: str | Path | None = None,
    readme: str | None = None,
) -> None:
    """Write a full checkpoint in shards with an index, with the source's config and tokenizer files.

    The folder is written completely or not at all. Every process calls this, and the main one writes.

    Args:
      weights: all weights, with layers in the spec's form, in the dtype to write.
      source: the directory of the base.
      tokenizer: a different tokenizer used in training, as for `load_tokenizer`; None: the base's.
      readme: the text of README.md; None: no README.md.

    Raises:
      UserError: the folder exists already.
    """
    folder = Path(out)
    refuse_existing(folder)
    renders = Path(source) if tokenizer is None else tokenizer_folder(tokenizer)
    shards = _shards(spec, weights)
    with claimed(folder) if hosts.is_main() else nullcontext():
        refuse_existing(folder)
        with new_folder(folder) if hosts.is_main() else nullcontext(folder) as staging:
            weight_map: dict[str, str] = {}
            for i, arrays in enumerate(shards):
                name = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
                tensors = {key: hosts.whole(get()) for key, get in arrays.items()}
                if hosts.is_main():
                    save_file(tensors, staging / name, metadata={"format": "pt"})
                weight_map |= dict.fromkeys(tensors, name)
            if not hosts.is_main():
                return
            total = sum(x.nbytes for x in jax.tree.leaves(weights))
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            (staging / INDEX).write_text(json.dumps(index, indent=2) + "\n")
            copy_files(source, staging, MODEL_FILES)
            copy_files(renders, staging, TOKENIZER_FILES)
            if readme is not None:
                (staging / "README.md").write_text(readme)
            _record_dtype(staging / "config.json", str(jax.tree.leaves(weights)[0].dtype))


def refuse_existing(folder: Path) -> None:
    """Raise `UserError` if the path exists."""
    if folder.exists():
        raise UserError(f"{folder}: exists already; give a new folder")


# The files of the base's folder that are copied when a model is written, beside its tokenizer.
MODEL_FILES = ("config.json", GENERATION)
TOKENIZER_FILES = (
    *("tokenizer.json", _CONFIG, "special_tokens_map.json", "added_tokens.json"),
    *("chat_template.jinja", "chat_template.json", "vocab.json", "vocab.txt", "merges.txt"),
    *("tokenizer.model", "spiece.model", "sentencepiece.bpe.model"),
)


def copy_files(source: str | Path, out: Path, names: Sequence[str]) -> None:
    """Copy those of these files that exist in a folder; links leading out of it are not followed."""
    for name in names:
        if (Path(source) / name).is_file():
            shutil.copyfile(file_in(source, name), out / name)


def _record_dtype(file: Path, dtype: str) -> None:
    """Set the dtype in config.json to that of the weights beside it."""
    values = read_json(file)
    names = [name for name in ("dtype", "torch_dtype") if values.get(name) not in (None, dtype)]
    if names:
        file.write_text(json.dumps(values | dict.fromkeys(names, dtype), indent=2) + "\n")


def _shards(spec: ModelSpec, weights: Tree) -> list[dict[str, Callable[[], jax.Array]]]:
    """The weights by Hugging Face key, each as a function that returns it, grouped into files by size."""
    shards: list[dict[str, Callable[[], jax.Array]]] = [{}]
    size = 0
    for key, nbytes, get in _arrays(spec, weights):
        if size and size + nbytes > _SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][key] = get
        size += nbytes
    return shards


def _arrays(spec: ModelSpec, weights: Tree) -> Iterator[tuple[str, int, Callable[[], jax.Array]]]:
    """Yield the Hugging Face key, the bytes, and a function returning the array, of every weight."""
    for weight in spec.table:
        if not weight.stacked:
            array = get_path(weights, weight.path)[weight.array]
            yield weight.hf_key, array.nbytes, partial(_cut, array)
            continue
        depth = spec.config.num_hidden_layers
        for i in range(depth):
            if spec.scan:
                array = get_path(weights, weight.path)[weight.array]
                size, place = array.nbytes // depth, [i]
            else:
                array = get_path(weights["layers"][i], weight.path.removeprefix("layers."))[weight.array]
                size, place = array.nbytes, []
            keys = weight.keys(i)
            for expert, key in enumerate(keys):
                own = [*place, expert] if weight.experts else place
                yield key, size // len(keys), partial(_cut, array, *own)


def _cut(array: jax.Array, *place: int) -> jax.Array:
    return array[place] if place else array


def weights_sha256(folder: Path) -> str:
    """SHA-256 of a folder's safetensors file or, if there are several, over their hashes by name."""
    files = sorted(folder.glob("*.safetensors"))
    if len(files) == 1:
        return sha256_of(files[0])
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.name}\0{sha256_of(file)}\0".encode())
    return digest.hexdigest()


def fingerprint(directory: str | Path) -> str:
    """A hash that identifies a base without reading all its weights.

    SHA-256 over `config.json` and, for each safetensors file, its name, size and header, and the first and
    last 64 KiB of its tensors.
    """
    digest = hashlib.sha256()
    digest.update((Path(directory) / "config.json").read_bytes())
    # In a folder copied partly, or without its index, whatever files exist.
    for file in [file for file in loaded_files(directory) if exists(file)] or weight_files(directory):
        size = file_size(file)
        digest.update(f"{Path(file).name}\0{size}\0".encode())
        start = min(8, size)
        header = int.from_bytes(read_bytes(file, 0, start).tobytes(), "little")
        length = min(header, size, HEADER_LIMIT) + 65536
        digest.update(read_bytes(file, start, min(length, size - start)).tobytes())
        tail = min(size, 65536)
        digest.update(read_bytes(file, size - tail, tail).tobytes())
    return digest.hexdigest()
