"""Adapters out and in, in PEFT's format: `adapter_model.safetensors` and `adapter_config.json`.

    export_adapter("adapter", spec, lora, "Qwen/Qwen3-8B", seed=0)             # PEFT and vLLM load it
    lora_config, lora, metadata = import_adapter("adapter", model_config)      # ours, PEFT's or Tinker's

A third file, `jaxlora.json`, records the condition and the seed, so that an evaluation knows what it scores.
Reading is strict: every key is used, none is missing, and a feature that this package does not compute is
refused, because an adapter that is only partly applied still answers, just not as it was trained to.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from jaxlora.config import Condition, LoraConfig
from jaxlora.lora import check_lora, get_path, lora_shapes, set_path
from jaxlora.models.decoder import ModelSpec, Tree
from jaxlora.models.spec import ModelConfig
from jaxlora.models.table import Weight
from jaxlora.runtime import hosts
from jaxlora.runtime.errors import UserError
from jaxlora.runtime.files import read_object, write_json_atomic
from jaxlora.runtime.folders import file_in, new_folder

WEIGHTS, SETTINGS, METADATA = "adapter_model.safetensors", "adapter_config.json", "jaxlora.json"
PARTS = {"lora_a": "lora_A", "lora_b": "lora_B"}  # ours -> PEFT's
PREFIX = "base_model.model."

# Settings of PEFT that do not change what an adapter computes once it is trained. Every other setting must
# be off: also one that a later PEFT adds.
_HARMLESS = {
    *("peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
    *("inference_mode", "r", "lora_alpha", "lora_dropout", "use_rslora", "target_modules", "exclude_modules"),
    *("init_lora_weights", "layers_pattern", "megatron_core", "qalora_group_size", "ensure_weight_tying"),
    *("eva_config", "loftq_config", "runtime_config"),
}
# Initialisations that leave the base as it is; PiSSA, OLoRA, LoftQ and others train against a changed one.
_HARMLESS_INITS = (True, False, None, "gaussian", "eva", "orthogonal")
_MAX_JSON_BYTES, _MAX_RANK, _MAX_ALPHA = 10**7, 65_536, 1e6


def export_adapter(
    out_dir: str | Path,
    spec: ModelSpec,
    lora: Tree,
    base_name: str,
    *,
    seed: int | None = None,
    extra: dict[str, Any] | None = None,
    overwrite: bool = False,
) -> None:
    """Write an adapter as a PEFT folder, whole or not at all.

    Args:
      out_dir: the folder to make. It is written beside its place and then renamed.
      spec: the model and the placement that `lora` belongs to.
      lora: the adapter's tree, float32, stacked over layers, on the devices in any layout. In a job of
        several processes all of them call this, and the first one writes.
      base_name: name or path of the base, for `base_model_name_or_path`.
      seed: seed of the adapter's initialisation; None: not known.
      extra: more to record in `jaxlora.json`, such as the run id and the step.
      overwrite: replace `out_dir` if it is an adapter already.

    Raises:
      UserError: the folder exists, the tree is not the placement's, or a value is not finite.
    """
    assert spec.lora is not None
    check_lora(spec, lora)
    tensors: dict[str, np.ndarray] = {}
    for weight in spec.adapted:
        pair = get_path(lora, weight.path)
        for part in PARTS:
            array = hosts.whole(pair[part])
            if not np.isfinite(array).all():
                raise UserError(f"adapter: {weight.path}.{part} holds NaN or infinity; it is not written")
            for name, layer in _names(weight, part, spec.config):
                tensors[PREFIX + name] = np.ascontiguousarray(array if layer is None else array[layer])
    if not hosts.is_main():
        return

    folder = Path(out_dir)
    if folder.exists():
        if not overwrite:
            raise UserError(f"{folder}: exists already; give a new folder")
        if not (folder / SETTINGS).is_file():
            raise UserError(f"{folder}: holds no adapter, so it is not overwritten; give a new folder")
    own: dict[str, Any] = {
        "condition": spec.lora.condition,
        "output_head": spec.lora.output_head,
        "seed": seed,
    }
    own |= {"rank": spec.lora.rank, "alpha": spec.lora.alpha}
    if clash := own.keys() & (extra or {}).keys():
        raise ValueError(f"extra must not repeat {', '.join(sorted(clash))}")

    with new_folder(folder) as staging:
        save_file(tensors, staging / WEIGHTS)
        write_json_atomic(staging / SETTINGS, _settings(spec, base_name))
        write_json_atomic(staging / METADATA, own | (extra or {}))


def import_adapter(directory: str | Path, config: ModelConfig) -> tuple[LoraConfig, Tree, dict[str, Any]]:
    """Read a PEFT folder for a model of this shape.

    Tinker's archives are read too: the head is named `unembed_tokens` there and `target_modules` may be null.

    Returns:
      The placement, found from the modules that are there; the tree, as of `init_lora`: float32, stacked,
      `A [layers, r, in]`, `B [layers, out, r]`; and the metadata: `jaxlora.json`, or as much of it as the
      adapter itself tells (`seed` is None where it is not recorded), with `base_model`.

    Raises:
      UserError: one line that names the file and what is wrong with it.
    """
    folder = Path(directory)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; give the folder that holds {SETTINGS}")
    if not (folder / SETTINGS).exists():
        raise UserError(f"{folder / SETTINGS}: missing; give the folder of an adapter")
    settings = read_object(file_in(folder, SETTINGS), _MAX_JSON_BYTES)
    rank, alpha = _scale(settings, folder / SETTINGS)
    file = file_in(folder, WEIGHTS)
    if not file.is_file():
        raise UserError(f"{file}: missing; an adapter is read from safetensors only")
    try:
        with safe_open(file, framework="np") as handle:
            slices = {}
            for key in handle.keys():  # noqa: SIM118 (not a mapping)
                name = _our_name(key)
                if name in slices:
                    raise UserError(f"{file}: {name} is stored twice, under two spellings")
                slices[name] = handle.get_slice(key)
            condition, output_head = _placement(slices, config, file)
            lora_config = LoraConfig(condition=condition, rank=rank, alpha=alpha, output_head=output_head)
            spec = ModelSpec(config, lora_config)
            _check_targets(settings, spec, folder / SETTINGS)
            lora = _read_tree(spec, slices, file)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file}: not a readable safetensors file: {error}") from None
    check_lora(spec, lora)
    return lora_config, lora, _read_metadata(folder, settings, lora_config)


def _names(weight: Weight, part: str, config: ModelConfig) -> Iterator[tuple[str, int | None]]:
    """File name (without PEFT's prefix) and layer of each tensor of one weight's A or B."""
    name = f"{weight.hf_key.removesuffix('.weight')}.{PARTS[part]}.weight"
    for layer in range(config.num_hidden_layers) if weight.stacked else (None,):
        yield name.format(layer=layer), layer


def _our_name(key: str) -> str:
    """A file's key as `model.layers.0.self_attn.q_proj.lora_A.weight` or `lm_head.lora_A.weight`."""
    name = key.removeprefix(PREFIX)
    for head in ("model.unembed_tokens.", "unembed_tokens."):  # Tinker's name of the output head
        if name.startswith(head):
            return "lm_head." + name.removeprefix(head)
    return f"model.{name}" if name.startswith("layers.") else name


def _settings(spec: ModelSpec, base_name: str) -> dict[str, Any]:
    """PEFT's `adapter_config.json`."""
    assert spec.lora is not None
    alpha = spec.lora.alpha
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "r": spec.lora.rank,
        "lora_alpha": int(alpha) if float(alpha).is_integer() else alpha,
        "target_modules": [weight.name for weight in spec.adapted],
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_dropout": 0.0,
        "modules_to_save": None,
        "use_dora": False,
        "use_rslora": False,
    }


def _scale(settings: dict[str, Any], file: Path) -> tuple[int, float]:
    """Rank and alpha, after refusing every setting that this package does not compute."""
    kind = settings.get("peft_type", "LORA")
    if kind != "LORA":
        raise UserError(f"{file}: peft_type is {kind!r}; only LORA is supported")
    for key, value in settings.items():
        if key not in _HARMLESS and value not in (None, False, "none", [], {}):
            raise UserError(f"{file}: {key} = {json.dumps(value)[:80]} is not supported; it must be off")
    init = settings.get("init_lora_weights")
    if init not in _HARMLESS_INITS:
        raise UserError(
            f"{file}: init_lora_weights = {init!r} changes the base; convert it to plain LoRA in PEFT"
        )
    rank, alpha = settings.get("r"), settings.get("lora_alpha")
    if not isinstance(rank, int) or isinstance(rank, bool) or not 0 < rank <= _MAX_RANK:
        raise UserError(f"{file}: r is {rank!r}; it must be a whole number from 1 to {_MAX_RANK}")
    if not isinstance(alpha, int | float) or isinstance(alpha, bool) or not 0 < alpha <= _MAX_ALPHA:
        raise UserError(f"{file}: lora_alpha is {alpha!r}; it must be above 0, at most {_MAX_ALPHA:g}")
    if not isinstance(settings.get("use_rslora"), bool | None):
        raise UserError(f"{file}: use_rslora is {settings['use_rslora']!r}; it must be true or false")
    if settings.get("use_rslora"):  # rank-stabilised: scaled by alpha / sqrt(r), where ours is alpha / r
        alpha *= math.sqrt(rank)
    return rank, float(alpha)


def _placement(slices: dict[str, Any], config: ModelConfig, file: Path) -> tuple[Condition, bool]:
    """Condition and output head, from the modules that the file names; leftovers are refused."""
    table = ModelSpec(config).table
    owner = {
        name: weight.path
        for weight in table
        if weight.lora_group
        for part in PARTS
        for name, _ in _names(weight, part, config)
    }
    unknown = sorted(slices.keys() - owner.keys())
    if unknown:
        raise UserError(f"{file}: {_unknown_reason(unknown, config)}")
    found = {owner[name] for name in slices}
    for condition in get_args(Condition):
        for output_head in (False, True):
            spec = ModelSpec(config, LoraConfig(condition=condition, output_head=output_head))
            if found == {weight.path for weight in spec.adapted}:
                return condition, output_head
    names = ", ".join(weight.name for weight in table if weight.path in found) or "nothing"
    known = ", ".join(get_args(Condition))
    raise UserError(f"{file}: adapts {names}; it must be exactly one of {known}, with or without the head")


def _unknown_reason(unknown: list[str], config: ModelConfig) -> str:
    first = f"{len(unknown)} tensors that this model has no place for: {', '.join(unknown[:2])}"
    if any(name.endswith(("base_layer.weight", "embed_tokens.weight")) for name in unknown):
        return f"{first}; save the adapter with save_embedding_layers=False"
    if config.tie_word_embeddings and unknown[0].startswith("lm_head.lora_"):
        return "adapts the output head, but this model ties its head to the embedding"
    return f"{first}; it has {config.num_hidden_layers} layers"


def _check_targets(settings: dict[str, Any], spec: ModelSpec, file: Path) -> None:
    """A list of `target_modules` must agree with the tensors: PEFT loads only what it lists."""
    targets = settings.get("target_modules")
    if not isinstance(targets, list) or settings.get("exclude_modules"):
        return  # null, a pattern or all-linear: the tensors decide
    names = {str(target).rpartition(".")[2] for target in targets}
    listed = {"lm_head" if name == "unembed_tokens" else name for name in names}
    stored = {weight.name for weight in spec.adapted}
    if listed != stored:
        odd = ", ".join(sorted(listed ^ stored))
        raise UserError(f"{file}: target_modules and the tensors of {WEIGHTS} disagree about {odd}")


def _read_tree(spec: ModelSpec, slices: dict[str, Any], file: Path) -> Tree:
    """The stacked float32 tree; shapes are checked before anything is read."""
    plan = []
    for weight in spec.adapted:
        for part, shape in zip(PARTS, lora_shapes(spec, weight), strict=True):
            for name, layer in _names(weight, part, spec.config):
                plan.append((weight, part, shape, name, layer))
    missing = [name for *_, name, _ in plan if name not in slices]
    if missing:
        raise UserError(f"{file}: {len(missing)} tensors are missing: {', '.join(missing[:2])}")
    for _, _, shape, name, layer in plan:
        expected = shape if layer is None else shape[1:]
        given = tuple(slices[name].get_shape())
        if given != expected:
            raise UserError(f"{file}: {name} has shape {given}; r and config.json ask for {expected}")
        if slices[name].get_dtype() not in ("F32", "F16", "BF16"):
            raise UserError(f"{file}: {name} is {slices[name].get_dtype()}; it must be F32, F16 or BF16")
    lora: Tree = {}
    for weight, part, shape, name, layer in plan:
        if not layer:
            stacked = np.empty(shape, np.float32)
        values = np.asarray(slices[name][:]).astype(np.float32)
        if not np.isfinite(values).all():
            raise UserError(f"{file}: {name} holds NaN or infinity")
        stacked[... if layer is None else layer] = values
        if layer is None or layer == spec.config.num_hidden_layers - 1:
            set_path(lora, f"{weight.path}.{part}", jnp.asarray(stacked))
    return lora


def _read_metadata(folder: Path, settings: dict[str, Any], lora: LoraConfig) -> dict[str, Any]:
    """What is known of the adapter; `jaxlora.json`, where it is there, must agree with the tensors."""
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
    for name, value in (("run_id", recorded.get("run_id")), ("base_model_name_or_path", base)):
        if value is not None and not (isinstance(value, str) and value.isprintable() and len(value) <= 1000):
            raise UserError(f"{folder}: {name} is {value!r:.100}; it must be a name or null")
    return recorded | found | {"seed": seed, "base_model": base}
