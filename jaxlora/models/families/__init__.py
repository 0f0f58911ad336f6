"""Model families, one file each: the place to add a new one.

    config = load_model_config("path/to/Qwen3-8B")     # a directory with config.json
    config.num_hidden_layers                           # 36
    parameter_table(config)                            # every weight, in the order of the forward pass

A family's file has `MODELS` (the models it covers, in words), `PUBLISHED` (shapes by name), `read_config`,
`weight_table` and `rotary_frequencies`; it is selected by the `model_type` in `config.json`.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import TypeAdapter, ValidationError

from jaxlora.models.families import llama, qwen2, qwen3, qwen3_moe
from jaxlora.models.spec import ModelConfig, Weight
from jaxlora.runtime.errors import UserError
from jaxlora.runtime.files import read_json

FAMILIES = {"llama": llama, "qwen2": qwen2, "qwen3": qwen3, "qwen3_moe": qwen3_moe}
# The nearest supported family of an unsupported one, by the prefix of its name.
_NEAREST = {"mistral": "llama", "mixtral": "llama", "llama4": "llama", "smollm": "llama", "qwen2": "qwen2"}
MAX_BYTES = 10**7  # of config.json


def load_model_config(directory: str | Path) -> ModelConfig:
    """Read `config.json` of a Hugging Face directory.

    Raises:
      UserError: no such file, not JSON, a family or a feature that is not supported.
    """
    file = Path(directory) / "config.json"
    if not file.exists():
        raise UserError(f"{file}: missing; model.path must be a directory with config.json")
    return model_config_from_dict(read_json(file, MAX_BYTES), str(file))


def model_config_from_dict(raw: Any, where: str = "config.json") -> ModelConfig:
    """A `ModelConfig` from the decoded `config.json`; an unsupported feature is an error, never ignored.

    Raises:
      UserError: see `load_model_config`.
    """
    if not isinstance(raw, dict):
        raise UserError(f"{where}: not a JSON object")
    kind = raw.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise UserError(f"{where}: {_unsupported(kind, 'text_config' in raw)}")
    try:
        values = FAMILIES[kind].read_config(raw) | {"model_type": kind}
        return TypeAdapter(ModelConfig).validate_python(values)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        name = ".".join(map(str, first["loc"]))
        raise UserError(f"{where}: {name or 'value'}: {first['msg']}") from None
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def _unsupported(kind: Any, wraps_text: bool) -> str:
    """The message for an unsupported `model_type`, naming the supported ones and the nearest."""
    known = ", ".join(f"{name!r} ({family.MODELS})" for name, family in FAMILIES.items())
    nearest = next((new for old, new in _NEAREST.items() if str(kind).startswith(old)), "qwen3")
    why = "; a wrapper around a text model and others (text_config)" if wraps_text else ""
    return f"model_type is {kind!r:.100}{why}; only {known} are supported, the nearest is {nearest!r}"


def published_config(name: str) -> ModelConfig:
    """The shape of a published model, such as `qwen3-8b`, base or instruct; nothing is downloaded.

    Raises:
      UserError: there is no published shape of this name.
    """
    shapes = {key: shape for family in FAMILIES.values() for key, shape in family.PUBLISHED.items()}
    key = name.lower().rpartition("/")[2].removesuffix("-instruct").removesuffix("-base")
    if key not in shapes:
        raise UserError(f"no published shape named {name!r}; known are {', '.join(shapes)}")
    return shapes[key]


def parameter_table(config: ModelConfig, joined: bool = False) -> list[Weight]:
    """All weights of a model, in the order of the forward pass.

    Args:
      joined: use the form of `jaxlora.generate.weights`, where the matrices of `JOINED` are concatenated.
    """
    return FAMILIES[config.model_type].weight_table(config, joined)


def rotary_frequencies(config: ModelConfig) -> np.ndarray:
    """Radians per position by which RoPE rotates each pair of a head's channels: float32 `[head_dim / 2]`."""
    return FAMILIES[config.model_type].rotary_frequencies(config)


def count_parameters(config: ModelConfig) -> int:
    """Number of parameters of the base, including embeddings; a tied head counts once."""
    return sum(_copies(w, config) * math.prod(w.shape) for w in parameter_table(config))


def count_matrix_parameters(config: ModelConfig) -> int:
    """The N in "2N FLOPs per token": weights that multiply activations, with the head but not the embedding.

    Only the experts that one token is routed to count.
    """
    table = [w for w in parameter_table(config) if len(w.shape) > 1 and w.path != "embed_tokens"]
    matrices = sum(_copies(w, config) * active_size(w, config) for w in table)
    return matrices + (config.vocab_size * config.hidden_size if config.tie_word_embeddings else 0)


def active_size(weight: Weight, config: ModelConfig) -> int:
    """Number of elements of one weight in one layer that one token is multiplied with."""
    size = math.prod(weight.shape)
    if not weight.experts or config.experts is None:
        return size
    return size // weight.experts * config.experts.num_experts_per_tok


def _copies(weight: Weight, config: ModelConfig) -> int:
    return config.num_hidden_layers if weight.stacked else 1
