"""Reading adapters: PEFT folders written by this package, by PEFT or by Tinker.

    adapter = read_adapter("adapter", model_config)
    spec = ModelSpec(model_config, adapter.lora, shapes=adapter.shapes)

Reading is strict: every key must be used and none may be missing, and a feature that this package does not
compute is refused, because a partly applied adapter still answers, just not as it was trained to.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

from jaxlora.checkpoints.base import Base, fingerprint
from jaxlora.checkpoints.expert_adapters import FUSED, ExpertAdapter, read_experts
from jaxlora.checkpoints.peft import (
    BASE_DTYPE,
    FINGERPRINT,
    METADATA,
    PARTS,
    PREFIX,
    RENDERED_BY,
    SETTINGS,
    WEIGHTS,
    Place,
    adaptable_modules,
    module_name,
)
from jaxlora.checkpoints.tensors import check_slice, open_tensors, slice_values
from jaxlora.config import Condition, LoraConfig
from jaxlora.data.limits import bounded
from jaxlora.lora import check_lora, get_path, lora_shapes, set_path
from jaxlora.models.decoder import ModelSpec, Tree
from jaxlora.models.spec import AdapterShape, ModelConfig
from jaxlora.runtime.errors import UserError
from jaxlora.runtime.files import read_object
from jaxlora.runtime.folders import file_in
from jaxlora.runtime.remote import EMBEDDED, cached_name, is_hub_name, is_remote, resolve, weight_files

# PEFT settings that do not change what a trained adapter computes, or that are read below. All others must be
# off, including those added by later versions of PEFT.
_KNOWN = {
    *("peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
    *("inference_mode", "r", "lora_alpha", "lora_dropout", "use_rslora", "target_modules", "exclude_modules"),
    *("init_lora_weights", "layers_pattern", "megatron_core", "qalora_group_size", "ensure_weight_tying"),
    *("eva_config", "loftq_config", "runtime_config", "rank_pattern", "alpha_pattern", "layers_to_transform"),
    "target_parameters",
}
# Initialisations that leave the base unchanged; PiSSA, OLoRA, LoftQ and others modify it.
_HARMLESS_INITS = (True, False, None, "gaussian", "eva", "orthogonal")
_MAX_JSON_BYTES, _MAX_RANK, _MAX_ALPHA = 10**7, 65_536, 1e30  # above it, float32 products overflow
_MAX_PATTERNS, _MAX_REPEATS, _PATTERN_SECONDS = 10_000, 10, 10.0


class Adapter(NamedTuple):
    """An adapter read from a folder."""

    lora: LoraConfig  # with the largest rank, if ranks or scales vary
    tree: Tree  # as from `init_lora`: float32, stacked, A [layers, r, in], B [layers, out, r]
    metadata: dict[str, Any]  # `jaxlora.json`, or as much of it as is known, with `base_model`
    shapes: tuple[AdapterShape, ...]  # empty if rank and scale are the same everywhere


def read_adapter(directory: str | Path, config: ModelConfig, base: str | Path | None = None) -> Adapter:
    """Read a PEFT folder for a model of this shape.

    Any subset of modules and layers is supported, with individual ranks and alphas (`rank_pattern`,
    `alpha_pattern`), rank-stabilised or not. So are Tinker's archives, in which the head is named
    `unembed_tokens` and `target_modules` may be null.

    Args:
      base: the directory of the base, for checking copies of its weights in the file; None: an adapter that
        contains such copies is refused.

    Raises:
      UserError: one line naming the file and what is wrong with it.
    """
    folder = resolve(str(directory))
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; give the folder that holds {SETTINGS}")
    if not (folder / SETTINGS).exists():
        raise UserError(f"{folder / SETTINGS}: missing; give the folder of an adapter")
    settings = read_object(file_in(folder, SETTINGS), _MAX_JSON_BYTES)
    _check_settings(settings, folder / SETTINGS)
    file = file_in(folder, WEIGHTS)
    if not file.is_file():
        raise UserError(f"{file}: missing; an adapter is read from safetensors only")
    try:
        with safe_open(file, framework="np") as handle:
            slices = {}
            for key in handle.keys():  # noqa: SIM118 (not a mapping)
                name = _our_name(key)
                if name in slices:
                    raise UserError(f"{file}: {name} is stored twice, under two names")
                slices[name] = handle.get_slice(key)
            _check_copies(slices, config, base, file)
            with _bounded_patterns(folder / SETTINGS):
                experts = _read_experts(settings, slices, config, folder)
                places = _places(slices, config, file, bool(experts))
                _check_asked(settings, places, config, folder)
                lora, shapes = _shape(settings, places, experts, config, folder)
            spec = ModelSpec(config, lora, shapes=shapes)
            tree = _read_tree(spec, places, experts, slices, file)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file}: not a readable safetensors file: {error}") from None
    check_lora(spec, tree)
    return Adapter(lora, tree, _read_metadata(folder, settings, lora), shapes)


def other_base(metadata: dict[str, Any], base: Base) -> str | None:
    """Why an adapter cannot belong to this base, in words; None if nothing proves it.

    A fingerprint recorded with the adapter is decisive. Without one, only names of the same kind are
    compared: a local folder with the right shapes may be a copy of the model known by a Hub name.
    """
    recorded, named, here = metadata.get(FINGERPRINT), metadata["base_model"], base.source.path
    rounded = metadata.get(BASE_DTYPE)
    if rounded is not None and rounded != base.source.base_dtype:
        given = base.source.base_dtype or base.source.dtype
        return f"was trained on its base in {rounded}, not in {given}; give base_dtype={rounded}"
    if recorded is not None:
        if not base.has_weights or base.fingerprint() == recorded:
            return None
        return f"was trained on a different base than {here!r} (their files differ){_called(named)}"
    if not named or base.is_drawn:
        return None
    theirs, ours = _known_name(named), _known_name(here)
    if theirs is not None and ours is not None:
        return f"names the base {named!r}, not {here!r}" if theirs != ours else None
    if theirs is None and base.has_weights and not is_remote(named) and Path(named).is_dir():
        with suppress(UserError, OSError):  # an unreadable folder proves nothing
            if weight_files(named) and fingerprint(named) != base.fingerprint():
                return f"names the base {named!r}, whose files differ from those of {here!r}"
    return None


def _called(named: str | None) -> str:
    return f", named {named!r}" if named else ""


def _known_name(path: str) -> str | None:
    """The public name of a base: a Hub name or a shipped one; None for any other location."""
    if path.startswith(EMBEDDED):
        return path
    name = cached_name(path) or (path if is_hub_name(path) else None)
    return name and name.lower()


def _our_name(key: str) -> str:
    """A file's key in the form `model.layers.0.self_attn.q_proj.lora_A.weight` or `lm_head.lora_A.weight`."""
    name = key.removeprefix(PREFIX)
    for head in ("model.unembed_tokens.", "unembed_tokens."):  # Tinker's name for the output head
        if name.startswith(head):
            return "lm_head." + name.removeprefix(head)
    return f"model.{name}" if name.startswith("layers.") else name


def _check_settings(settings: dict[str, Any], file: Path) -> None:
    """Refuse every setting that this package does not compute, and values that make no sense."""
    kind = settings.get("peft_type", "LORA")
    if kind != "LORA":
        raise UserError(f"{file}: peft_type is {kind!r}; only LORA is supported")
    for key, value in settings.items():
        if key not in _KNOWN and value not in (None, False, "none", [], {}):
            raise UserError(f"{file}: {key} = {json.dumps(value)[:80]} is not supported; it must be off")
    init = settings.get("init_lora_weights")
    if init not in _HARMLESS_INITS:
        raise UserError(
            f"{file}: init_lora_weights = {init!r} changes the base; convert it to plain LoRA in PEFT"
        )
    if not isinstance(settings.get("use_rslora"), bool | None):
        raise UserError(f"{file}: use_rslora is {settings['use_rslora']!r}; it must be true or false")
    _check_rank("r", settings.get("r"), file)
    _check_alpha("lora_alpha", settings.get("lora_alpha"), file)
    for name, check in (("rank_pattern", _check_rank), ("alpha_pattern", _check_alpha)):
        pattern = settings.get(name) or {}
        if not isinstance(pattern, dict) or len(pattern) > _MAX_PATTERNS:
            raise UserError(f"{file}: {name} is {json.dumps(pattern)[:80]}; it must be an object")
        for key, value in pattern.items():
            check(f"{name}[{key!r:.80}]", value, file)


def _check_rank(name: str, rank: Any, file: Path) -> None:
    if not isinstance(rank, int) or isinstance(rank, bool) or not 0 < rank <= _MAX_RANK:
        raise UserError(f"{file}: {name} is {rank!r:.80}; it must be a whole number from 1 to {_MAX_RANK}")


def _check_alpha(name: str, alpha: Any, file: Path) -> None:
    if not isinstance(alpha, int | float) or isinstance(alpha, bool) or not 0 < alpha <= _MAX_ALPHA:
        raise UserError(f"{file}: {name} is {alpha!r:.80}; it must be above 0, at most {_MAX_ALPHA:g}")


def _read_experts(
    settings: dict[str, Any], slices: dict[str, Any], config: ModelConfig, folder: Path
) -> dict[str, ExpertAdapter]:
    """The experts' adapters named by `target_parameters`; their tensors are removed from `slices`."""
    file, asked = folder / SETTINGS, settings.get("target_parameters") or []
    if not isinstance(asked, list) or not all(isinstance(name, str) for name in asked):
        raise UserError(f"{file}: target_parameters is {json.dumps(asked)[:80]}; it must be a list")
    known = [name for name in FUSED if any(f"model.layers.0.{name}".endswith(f".{one}") for one in asked)]
    odd = [one for one in asked if not any(f"model.layers.0.{name}".endswith(f".{one}") for name in FUSED)]
    if odd or (known and config.experts is None):
        raise UserError(f"{file}: target_parameters: this model has no parameter {(odd or asked)[0]!r:.80}")

    def rank_and_alpha(name: str) -> tuple[int, float]:
        return _rank_and_alpha(settings, name, file)

    return read_experts(slices, config, known, rank_and_alpha, folder / WEIGHTS)


def _rank_and_alpha(settings: dict[str, Any], name: str, file: Path) -> tuple[int, float]:
    """Rank and alpha of a module by name; alpha is scaled if rank-stabilised (alpha / sqrt(r), not / r)."""
    rank = _own(settings.get("rank_pattern"), name, settings["r"], file)
    alpha = float(_own(settings.get("alpha_pattern"), name, settings["lora_alpha"], file))
    return rank, alpha * math.sqrt(rank) if settings.get("use_rslora") else alpha


def _dense_modules(config: ModelConfig) -> dict[str, Place]:
    """Every module that can have its own adapter, which excludes experts."""
    return {name: place for name, place in adaptable_modules(config).items() if not place[0].experts}


def _places(slices: dict[str, Any], config: ModelConfig, file: Path, has_experts: bool) -> dict[str, Place]:
    """The modules that the file adapts, in table order; unknown tensors and lone halves are refused."""
    adaptable = _dense_modules(config)
    parts = [f".{part}.weight" for part in PARTS.values()]
    owner = {name + part: name for name in adaptable for part in parts}
    if unknown := sorted(slices.keys() - owner.keys()):
        raise UserError(f"{file}: {_unknown_reason(unknown, config)}")
    found = {owner[name] for name in slices}
    if not found and not has_experts:
        raise UserError(f"{file}: adapts nothing; {', '.join(get_args(Condition))} and lists are supported")
    _require_tensors([name + part for name in adaptable if name in found for part in parts], slices, file)
    return {name: place for name, place in adaptable.items() if name in found}


def _require_tensors(wanted: list[str], slices: dict[str, Any], file: Path) -> None:
    if missing := [name for name in wanted if name not in slices]:
        raise UserError(f"{file}: {len(missing)} tensors are missing: {', '.join(missing[:2])}")


def _check_asked(
    settings: dict[str, Any], places: dict[str, Place], config: ModelConfig, folder: Path
) -> None:
    """Check that the tensors are those that the settings name: PEFT loads only these.

    Raises:
      UserError: tensors are missing, or there are some that PEFT would ignore.
    """
    file, adaptable = folder / SETTINGS, _dense_modules(config)
    asked = _asked(settings, places, adaptable, file)
    absent = {name: adaptable[name][0] for name in asked - set(places)}
    kinds = {weight.path for weight, _ in places.values()}
    # Modules present but not asked for, or asked for but absent in every layer: the two lists disagree.
    odd = [name for name in places if name not in asked]
    odd += [name for name, weight in sorted(absent.items()) if weight.path not in kinds]
    if odd:
        named = ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in odd))
        given = [
            name
            for name in ("target_modules", "layers_to_transform", "exclude_modules")
            if settings.get(name)
        ]
        raise UserError(f"{file}: {' and '.join(given)} and the tensors of {WEIGHTS} disagree about {named}")
    _require_tensors(
        [f"{name}.{part}.weight" for name in sorted(absent) for part in PARTS.values()], {}, folder / WEIGHTS
    )


def _asked(
    settings: dict[str, Any], places: dict[str, Place], adaptable: dict[str, Place], file: Path
) -> set[str]:
    """The modules that the settings name."""
    targets, layers = settings.get("target_modules"), settings.get("layers_to_transform")
    if targets is None or targets == "all-linear":  # the kinds of modules present, in all layers
        kinds = {weight.path for weight, _ in places.values()}
        asked = {name for name, (weight, _) in adaptable.items() if weight.path in kinds}
    else:
        asked = {name for name in adaptable if _names_module(targets, name, file)}
    if layers is not None and layers != []:
        chosen = layers if isinstance(layers, list) else [layers]
        asked = {name for name in asked if adaptable[name][1] in chosen}
    if excluded := settings.get("exclude_modules"):
        asked = {name for name in asked if not _names_module(excluded, name, file)}
    return asked


def _names_module(targets: Any, name: str, file: Path) -> bool:
    """Whether `target_modules`, a list of names or suffixes or a pattern, matches this module, as in PEFT."""
    if isinstance(targets, list) and all(isinstance(target, str) for target in targets):
        ours = [_our_name(f"{target}.").removesuffix(".") for target in targets]
        ours = ["lm_head" if target == "unembed_tokens" else target for target in ours]
        return any(name == target or name.endswith(f".{target}") for target in ours)
    if isinstance(targets, str):
        return bool(_compiled(targets, file).fullmatch(name))
    raise UserError(f"{file}: target_modules is {json.dumps(targets)[:80]}; it must be a list or a pattern")


def _compiled(pattern: str, file: Path) -> re.Pattern[str]:
    """Compile a file's pattern; refuse slow ones: with repeated groups, back-references or many repeats."""
    try:
        repeats = len(re.findall(r"(?<!\\)[*+]|\{\d*,\}", pattern))
        if (
            len(pattern) > 1000
            or repeats > _MAX_REPEATS
            or re.search(r"\)[*+{]|\\[1-9]|\(\?(P[=>]|\()", pattern)
        ):
            raise ValueError("too complex")
        return _cached_pattern(pattern)
    except (re.error, ValueError, OverflowError, RecursionError) as error:
        raise UserError(f"{file}: the pattern {pattern!r:.80} cannot be used: {error}") from None


@contextmanager
def _bounded_patterns(file: Path) -> Iterator[None]:
    """Bound the total time: patterns that pass the checks may still be slow if there are thousands."""
    try:
        with bounded(_PATTERN_SECONDS, memory=2**40):
            yield
    except TimeoutError as error:
        raise UserError(f"{file}: its patterns cannot be used: {error}") from None


_cached_pattern = cache(re.compile)


def _shape(
    settings: dict[str, Any],
    places: dict[str, Place],
    experts: dict[str, ExpertAdapter],
    config: ModelConfig,
    folder: Path,
) -> tuple[LoraConfig, tuple[AdapterShape, ...]]:
    """Placement, rank and alpha of the adapter, and ranks and scales by layer if they vary."""
    ranks, alphas = {}, {}
    for name in places:
        ranks[name], alphas[name] = _rank_and_alpha(settings, name, folder / SETTINGS)
    active = config.experts.num_experts_per_tok if config.experts else 1
    # The rank that, divided by the number of active experts, gives each expert's.
    rank = max(ranks.values(), default=0) or active * max(own.a.shape[1] for own in experts.values())
    usual = set(ranks.values()) | {active * own.a.shape[1] for own in experts.values()}
    ranks |= {name: own.a.shape[1] for name, own in experts.items()}
    alphas |= {name: own.alpha for name, own in experts.items()}
    adaptable = adaptable_modules(config)
    paths = {adaptable[name][0].path for name in ranks}
    lora = LoraConfig(
        targets=_targets(paths, config),
        rank=rank,
        alpha=next(iter(alphas.values())),
        output_head="lm_head" in paths,
    )
    whole = {name for name, (weight, _) in adaptable.items() if weight.path in paths}
    if whole == set(ranks) and len(usual) == len(set(alphas.values())) == 1:
        return lora, ()
    shapes = []
    for weight in ModelSpec(config, lora).adapted:
        layers = range(config.num_hidden_layers) if weight.stacked else (None,)
        names = [module_name((weight, layer)) for layer in layers]
        own = tuple(ranks.get(name, 0) for name in names)
        scales = tuple(alphas[name] / ranks[name] if name in ranks else 0.0 for name in names)
        shapes.append(AdapterShape(weight.path, own, scales))
    return lora, tuple(shapes)


def _own(pattern: dict[str, Any] | None, name: str, default: Any, file: Path) -> Any:
    """A pattern's value for a module: of the first key that matches its name or a suffix, as in PEFT."""
    for key, value in (pattern or {}).items():
        if _compiled(rf"(.*\.)?({key})$" if len(key) < 900 else key, file).match(name):
            return value
    return default


def _targets(paths: set[str], config: ModelConfig) -> str:
    """The named placement of these weights, or the list of their modules, without the head."""
    inner = paths - {"lm_head"}
    for condition in get_args(Condition):
        spec = ModelSpec(config, LoraConfig(targets=condition))
        if inner == {weight.path for weight in spec.adapted}:
            return condition
    names = [w.name for w in ModelSpec(config).adaptable if w.path in inner]
    return ",".join(names or ["lm_head"])


def _check_copies(slices: dict[str, Any], config: ModelConfig, base: str | Path | None, file: Path) -> None:
    """Remove copies of the base's weights, which PEFT may store, from `slices`; they must equal the base."""
    keys = {name: name for name in ("model.embed_tokens.weight", "lm_head.weight")}  # save_embedding_layers
    keys |= {f"{name}.base_layer.weight": f"{name}.weight" for name in adaptable_modules(config)}
    keys["model.embed_tokens.base_layer.weight"] = "model.embed_tokens.weight"
    copies = [name for name in slices if name in keys]
    if not copies:
        return
    if base is None or not weight_files(base):
        raise UserError(
            f"{file}: holds copies of the base's weights ({copies[0]}), but there is no base to compare with;"
            " save the adapter with save_embedding_layers=False"
        )
    stored = open_tensors(base)
    for name in copies:
        own = stored.get(keys[name])
        given = slices.pop(name)
        if own is None or tuple(given.get_shape()) != own.shape:
            raise UserError(f"{file}: {name} is not a copy of any weight of the base")
        for start in range(0, own.shape[0], 8192):
            stop = min(start + 8192, own.shape[0])
            theirs, ours = given[start:stop], own.rows(start, stop)
            if not np.array_equal(theirs.astype(np.float32), ours.astype(np.float32)):
                raise UserError(
                    f"{file}: {name} differs from the base's; this adapter belongs to another base"
                )


def _unknown_reason(unknown: list[str], config: ModelConfig) -> str:
    first = f"{len(unknown)} tensors that do not belong to this model: {', '.join(unknown[:2])}"
    if any(".lora_embedding_" in name for name in unknown):
        return "adapts embed_tokens, which is not supported; adapt lm_head, or train all weights"
    if any(name.endswith(("base_layer.weight", "embed_tokens.weight")) for name in unknown):
        return f"{first}; save the adapter with save_embedding_layers=False"
    return f"{first}; it has {config.num_hidden_layers} layers"


def _read_tree(
    spec: ModelSpec,
    places: dict[str, Place],
    experts: dict[str, ExpertAdapter],
    slices: dict[str, Any],
    file: Path,
) -> Tree:
    """Read the stacked float32 tree; all shapes are checked first."""
    tree: Tree = {}
    plan = []
    for weight in spec.adapted:
        for part, shape in zip(PARTS, lora_shapes(spec, weight), strict=True):
            set_path(tree, f"{weight.path}.{part}", np.zeros(shape, np.float32))
    for name, (weight, layer) in places.items():
        rank = spec.ranks(weight)[layer or 0]
        shapes = (rank, weight.shape[1]), (weight.shape[0], rank)
        for part, expected in zip(PARTS, shapes, strict=True):
            key = f"{name}.{PARTS[part]}.weight"
            sizes = "r, rank_pattern" if spec.shapes else "r"
            check_slice(slices[key], key, expected, f"{sizes} and config.json", file)
            whole = get_path(tree, weight.path)[part]
            plan.append((key, whole if layer is None else whole[layer], expected))
    for key, array, (rows, columns) in plan:
        array[:rows, :columns] = slice_values(slices[key], key, file)
    adaptable = adaptable_modules(spec.config)
    for name, own in experts.items():
        weight, layer = adaptable[name]
        for part, values in (("lora_a", own.a), ("lora_b", own.b)):
            whole = get_path(tree, weight.path)[part][layer]
            whole[tuple(slice(size) for size in values.shape)] = values
    return jax.tree.map(jnp.asarray, tree)


def _read_metadata(folder: Path, settings: dict[str, Any], lora: LoraConfig) -> dict[str, Any]:
    """What is known about the adapter; `jaxlora.json`, if present, must agree with the tensors."""
    found: dict[str, Any] = {"condition": lora.condition, "output_head": lora.output_head}
    found |= {"rank": lora.rank, "alpha": lora.alpha}
    file = file_in(folder, METADATA)
    recorded = read_object(file, _MAX_JSON_BYTES) if file.exists() else {}
    for key, value in found.items():
        if recorded.get(key, value) != value:
            raise UserError(f"{file}: {key} is {recorded[key]!r}, but the adapter has {value!r}")
    seed = recorded.get("seed")
    for name in ("seed", "step"):
        value = recorded.get(name)
        if value is not None and (type(value) is not int or not 0 <= value < 2**63):
            raise UserError(f"{file}: {name} is {value!r}; it must be a whole number or null")
    base = settings.get("base_model_name_or_path")
    hashes = [(name, recorded.get(name)) for name in (FINGERPRINT, RENDERED_BY)]
    for name, value in (("run_id", recorded.get("run_id")), ("base_model_name_or_path", base), *hashes):
        if value is not None and not (isinstance(value, str) and value.isprintable() and len(value) <= 1000):
            raise UserError(f"{folder}: {name} is {value!r:.100}; it must be a name or null")
    return recorded | found | {"seed": seed, "base_model": base}
