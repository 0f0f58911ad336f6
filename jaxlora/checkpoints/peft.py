"""Writing adapters in PEFT's format: `adapter_model.safetensors` and `adapter_config.json`.

    export_adapter("adapter", spec, lora, "Qwen/Qwen3-8B", seed=0)     # PEFT and vLLM load it

A third file, `jaxlora.json`, records the placement and the seed, so that an evaluation knows what it scores.
`jaxlora.checkpoints.adapters` reads these folders.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from jaxlora.checkpoints.base import TOKENIZER_FILES, copy_files, refuse_existing, tokenizer_sha256
from jaxlora.checkpoints.expert_adapters import expert_settings, expert_tensors, fused_targets
from jaxlora.config import LoraConfig
from jaxlora.lora import check_lora, get_path
from jaxlora.models.decoder import ModelSpec, Tree
from jaxlora.models.spec import ModelConfig, Weight
from jaxlora.runtime import hosts
from jaxlora.runtime.errors import UserError
from jaxlora.runtime.files import write_json_atomic
from jaxlora.runtime.folders import claimed, new_folder

WEIGHTS, SETTINGS, METADATA = "adapter_model.safetensors", "adapter_config.json", "jaxlora.json"
ADAPTER_FILES = (WEIGHTS, SETTINGS, METADATA)
BASE_DTYPE = "base_dtype"  # in `jaxlora.json` of an adapter trained on a quantised base
FINGERPRINT, RENDERED_BY = "base_fingerprint", "tokenizer_sha256"  # in `jaxlora.json`
PARTS = {"lora_a": "lora_A", "lora_b": "lora_B"}  # ours -> PEFT's
PREFIX = "base_model.model."

Place = tuple[Weight, int | None]  # an adapted weight and its layer (None outside the layers)


def module_name(place: Place) -> str:
    """The module's name in Hugging Face models, such as `model.layers.0.self_attn.q_proj`.

    The projections of experts are named as if they were one module, `model.layers.0.mlp.experts.up_proj`.
    """
    weight, layer = place
    return weight.hf_key.replace(".{expert}", "").removesuffix(".weight").format(layer=layer)


def adaptable_modules(config: ModelConfig) -> dict[str, Place]:
    """Every module that can have an adapter, by name, in table order."""
    found = {}
    for weight in ModelSpec(config).adaptable:
        for layer in range(config.num_hidden_layers) if weight.stacked else (None,):
            found[module_name((weight, layer))] = (weight, layer)
    return found


def export_adapter(
    out_dir: str | Path,
    spec: ModelSpec,
    lora: Tree,
    base_name: str,
    *,
    seed: int | None = None,
    extra: dict[str, Any] | None = None,
    tokenizer: str | Path | None = None,
    base_fingerprint: str | None = None,
    readme: str | None = None,
    overwrite: bool = False,
) -> None:
    """Write an adapter as a PEFT folder, completely or not at all.

    Args:
      out_dir: the folder to create. It is written under a temporary name beside it and then renamed.
      spec: the model and placement that `lora` belongs to.
      lora: the adapter's tree, float32, stacked over layers, on the devices with any sharding. With several
        processes, all call this and the main one writes.
      base_name: name or path of the base, for `base_model_name_or_path`.
      seed: seed of the adapter's initialisation; None: unknown.
      extra: further entries for `jaxlora.json`, such as the run id and the step.
      tokenizer: the folder of the tokenizer that rendered the rows; its files are copied beside the adapter
        and its hash is recorded.
      base_fingerprint: recorded so that a different base is refused; None: unknown.
      readme: the text of README.md; None: no README.md.
      overwrite: replace `out_dir` if it already holds an adapter.

    Raises:
      UserError: the folder exists, the tree is not the placement's, or a value is not finite.
    """
    assert spec.lora is not None
    check_lora(spec, lora)
    tensors = _tensors(spec, lora)
    if not hosts.is_main():
        return

    own = _metadata(spec, spec.lora, seed, extra or {})
    if base_fingerprint is not None:
        own[FINGERPRINT] = base_fingerprint
    if tokenizer is not None:
        own[RENDERED_BY] = tokenizer_sha256(tokenizer)
    folder = Path(out_dir)
    _check_place(folder, overwrite)
    with claimed(folder):
        _check_place(folder, overwrite)
        with new_folder(folder) as staging:
            save_file(tensors, staging / WEIGHTS)
            write_json_atomic(staging / SETTINGS, _settings(spec, base_name))
            write_json_atomic(staging / METADATA, own)
            if tokenizer is not None:
                copy_files(tokenizer, staging, TOKENIZER_FILES)
            if readme is not None:
                (staging / "README.md").write_text(readme)


def _metadata(spec: ModelSpec, lora: LoraConfig, seed: int | None, extra: dict[str, Any]) -> dict[str, Any]:
    """What PEFT's settings do not record about the adapter."""
    own: dict[str, Any] = {"condition": lora.condition, "output_head": lora.output_head, "seed": seed}
    own |= {"rank": lora.rank, "alpha": lora.alpha}
    if spec.scheme is not None:
        own |= {BASE_DTYPE: spec.scheme.kind, "base_products": spec.scheme.products}
    if clash := own.keys() & extra.keys() - {BASE_DTYPE, "base_products"}:
        raise ValueError(f"extra must not repeat {', '.join(sorted(clash))}")
    return own | extra


def _tensors(spec: ModelSpec, lora: Tree) -> dict[str, np.ndarray]:
    """The tensors by PEFT's names: `[rank, in]` and `[out, rank]` for each module, without padding."""
    tensors = {PREFIX + name: array for name, array in expert_tensors(spec, lora)}
    for weight in spec.adapted:
        if weight.experts:
            continue
        pair = get_path(lora, weight.path)
        for part in PARTS:
            array = hosts.whole(pair[part])
            if not np.isfinite(array).all():
                raise UserError(f"adapter: {weight.path}.{part} holds NaN or infinity; it is not written")
            layers = range(spec.config.num_hidden_layers) if weight.stacked else (None,)
            for layer, rank in zip(layers, spec.ranks(weight), strict=True):
                if rank:
                    matrix = array if layer is None else array[layer]
                    matrix = matrix[:rank] if part == "lora_a" else matrix[:, :rank]
                    name = f"{PREFIX}{module_name((weight, layer))}.{PARTS[part]}.weight"
                    tensors[name] = np.ascontiguousarray(matrix)
    return tensors


def _check_place(folder: Path, overwrite: bool) -> None:
    """Refuse an existing path, unless it is an adapter and `overwrite` is set."""
    if overwrite and folder.exists() and not (folder / SETTINGS).is_file():
        raise UserError(f"{folder}: holds no adapter, so it is not overwritten; give a new folder")
    if not overwrite:
        refuse_existing(folder)


def _settings(spec: ModelSpec, base_name: str) -> dict[str, Any]:
    """PEFT's `adapter_config.json`."""
    assert spec.lora is not None
    ranks, scales = {}, {}
    dense = [weight for weight in spec.adapted if not weight.experts]
    for weight in dense:
        layers = range(spec.config.num_hidden_layers) if weight.stacked else (None,)
        for layer, rank, scale in zip(layers, spec.ranks(weight), spec.scales(weight), strict=True):
            if rank:
                ranks[module_name((weight, layer))], scales[module_name((weight, layer))] = rank, scale
    alphas = {name: scales[name] * rank for name, rank in ranks.items()}
    everywhere = all(all(spec.ranks(weight)) for weight in dense)
    own_rank = {re.escape(name): rank for name, rank in ranks.items() if rank != spec.lora.rank}
    own_alpha = {re.escape(name): _number(a) for name, a in alphas.items() if a != spec.lora.alpha}
    experts = expert_settings(spec)
    own_rank |= {re.escape(name): rank for name, (rank, _) in experts.items()}
    own_alpha |= {re.escape(name): _number(alpha) for name, (_, alpha) in experts.items()}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "r": spec.lora.rank,
        "lora_alpha": _number(spec.lora.alpha),
        "target_modules": [weight.name for weight in dense] if everywhere else list(ranks),
        **({"target_parameters": list(fused_targets(spec))} if experts else {}),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_dropout": 0.0,
        "modules_to_save": None,
        "use_dora": False,
        "use_rslora": False,
        **({"rank_pattern": own_rank, "alpha_pattern": own_alpha} if spec.shapes or experts else {}),
    }


def _number(value: float) -> int | float:
    return int(value) if float(value).is_integer() else value
