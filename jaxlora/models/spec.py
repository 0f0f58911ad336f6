"""The shape of a Qwen3 model, read from a Hugging Face `config.json`.

config = load_model_config("path/to/Qwen3-8B")     # a directory with config.json
config.num_hidden_layers                           # 36
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from jaxlora.runtime.errors import UserError
from jaxlora.runtime.files import read_json

MAX_BYTES = 10**7  # of config.json
Size = Annotated[int, Field(gt=0, le=1 << 24, strict=True)]


@dataclass(frozen=True, config=ConfigDict(extra="forbid", allow_inf_nan=False))
class ModelConfig:
    """Qwen3 (dense), with the names of Hugging Face's `config.json`."""

    vocab_size: Size
    hidden_size: Size
    intermediate_size: Size
    num_hidden_layers: Annotated[int, Field(gt=0, le=1024, strict=True)]
    num_attention_heads: Size
    num_key_value_heads: Size
    head_dim: Size
    rope_theta: Annotated[float, Field(gt=1)] = 1_000_000.0
    rms_norm_eps: Annotated[float, Field(gt=0)] = 1e-6
    max_position_embeddings: Size = 40960
    tie_word_embeddings: bool = False
    eos_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError("num_attention_heads must be a multiple of num_key_value_heads")
        if self.head_dim % 2:
            raise ValueError("head_dim must be even, because rotary embedding turns pairs")


# Shapes of the published dense models, for planning and benchmarks with random weights.
_PUBLISHED = {  # hidden, intermediate, layers, heads, key-value heads, tied
    "qwen3-0.6b": (1024, 3072, 28, 16, 8, True),
    "qwen3-1.7b": (2048, 6144, 28, 16, 8, True),
    "qwen3-4b": (2560, 9728, 36, 32, 8, True),
    "qwen3-8b": (4096, 12288, 36, 32, 8, False),
    "qwen3-14b": (5120, 17408, 40, 40, 8, False),
    "qwen3-32b": (5120, 25600, 64, 64, 8, False),
}


def published_config(name: str) -> ModelConfig:
    """The shape of a published model, such as `qwen3-8b`; nothing is downloaded.

    Raises:
      UserError: the name is not one of the dense Qwen3 models.
    """
    key = name.lower().removeprefix("qwen/")
    if key not in _PUBLISHED:
        raise UserError(f"no published shape named {name!r}; known are {', '.join(_PUBLISHED)}")
    hidden, intermediate, layers, heads, kv_heads, tied = _PUBLISHED[key]
    return ModelConfig(
        vocab_size=151936,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=128,
        tie_word_embeddings=tied,
        eos_token_ids=(151645,),
    )


def load_model_config(directory: str | Path) -> ModelConfig:
    """Read `config.json` of a Hugging Face directory.

    Raises:
      UserError: no such file, not JSON, not Qwen3 (dense), or a feature that this package has not.
    """
    file = Path(directory) / "config.json"
    if not file.exists():
        raise UserError(f"{file}: missing; model.path must be a directory with config.json")
    return model_config_from_dict(read_json(file, MAX_BYTES), str(file))


def model_config_from_dict(raw: Any, where: str = "config.json") -> ModelConfig:
    """A `ModelConfig` from the decoded `config.json`; unsupported features are errors, never ignored.

    Raises:
      UserError: see `load_model_config`.
    """
    if not isinstance(raw, dict):
        raise UserError(f"{where}: not a JSON object")
    if raw.get("model_type") != "qwen3":
        raise UserError(
            f"{where}: model_type is {raw.get('model_type')!r:.100}; only 'qwen3' (dense) is supported"
        )
    refused = {
        "hidden_act": raw.get("hidden_act", "silu") != "silu",
        "attention_bias": bool(raw.get("attention_bias")),
        "use_sliding_window": bool(raw.get("use_sliding_window")),
        "rope_scaling": raw.get("rope_scaling") is not None,
        "quantization_config": raw.get("quantization_config") is not None,
    }
    # Transformers 5 keeps the rotary base in rope_parameters; older files have it at the top level.
    rope = raw.get("rope_parameters") or {}
    if not isinstance(rope, dict):
        raise UserError(f"{where}: rope_parameters is not an object")
    refused["rope_parameters"] = rope.get("rope_type", "default") != "default"
    for key, is_refused in refused.items():
        if is_refused:
            raise UserError(f"{where}: {key} = {raw.get(key)!r:.100} is not supported")
    values = {key: raw[key] for key in ModelConfig.__pydantic_fields__ if key in raw}  # type: ignore[attr-defined]
    if "rope_theta" in rope:
        values["rope_theta"] = rope["rope_theta"]
    if values.get("head_dim") is None and raw.get("hidden_size") and raw.get("num_attention_heads"):
        values["head_dim"] = _quotient(raw["hidden_size"], raw["num_attention_heads"], where)
    eos = raw.get("eos_token_id")
    values["eos_token_ids"] = () if eos is None else tuple(eos) if isinstance(eos, list) else (eos,)
    try:
        return TypeAdapter(ModelConfig).validate_python(values)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        name = ".".join(map(str, first["loc"]))
        raise UserError(f"{where}: {name or 'value'}: {first['msg']}") from None


def _quotient(hidden_size: Any, heads: Any, where: str) -> int:
    try:
        return int(hidden_size) // int(heads)
    except (TypeError, ValueError, ArithmeticError):
        raise UserError(
            f"{where}: hidden_size and num_attention_heads must be positive whole numbers"
        ) from None
