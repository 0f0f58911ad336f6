"""The mesh on which sampler and learner share one base, if there is such a mesh; and the sampler's slots.

    config = mesh_for_both(config, model, longest=768)      # with the mesh filled in, for this machine

The sampler cannot gather weights for every token, so it shares the learner's arrays only if `fsdp` splits
none of them: every device holds them whole, or `tensor` splits them by heads. Otherwise it keeps a copy,
split by heads.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import jax

from jaxlora.config import MeshConfig, RLConfig, RunConfig
from jaxlora.data.packing import round_up
from jaxlora.estimate import FULL, Choice, candidates, mesh_here, with_mesh
from jaxlora.generate.decode import WINDOW_MULTIPLE, Sampling
from jaxlora.generate.weights import decode_form
from jaxlora.models.decoder import ModelSpec, Tree
from jaxlora.models.quantised import pick_scheme
from jaxlora.models.spec import ModelConfig
from jaxlora.runtime.devices import Slice, slice_of
from jaxlora.sharding import decode_mesh


def mesh_for_both(config: RunConfig, model: ModelConfig, longest: int) -> RunConfig:
    """The configuration with its mesh filled in for this machine's devices.

    On TPUs, see `mesh_on_slice`. On GPUs, as in supervised training: replicas of the base if they fit. On
    other devices, tensor parallelism over as many devices as evenly divide the KV heads.

    Args:
      longest: tokens of the longest prompt and answer.
    """
    devices = jax.devices()
    if config.mesh != MeshConfig() or len(devices) == 1 or devices[0].platform == "gpu":
        return mesh_here(config, model)
    if (slice_ := slice_of(devices)) is not None:
        return mesh_on_slice(config, model, slice_, longest)
    tensor = math.gcd(len(devices), model.num_key_value_heads)
    return replace(config, mesh=MeshConfig(len(devices) // tensor, 1, tensor))


def mesh_on_slice(config: RunConfig, model: ModelConfig, slice_: Slice, longest: int) -> RunConfig:
    """The configuration with the mesh that should learn fastest of those that fit and share the base.

    If there is none, or if all weights are trained, the mesh of supervised training.
    """
    if config.mesh == MeshConfig() and config.train.what == "lora":
        for choice, memory in choices(config, model, slice_, longest):
            if memory < FULL * slice_.chip.hbm_bytes:
                return replace(config, mesh=choice.mesh)
    return with_mesh(config, model, slice_)


def choices(
    config: RunConfig, model: ModelConfig, slice_: Slice, longest: int
) -> Iterator[tuple[Choice, float]]:
    """The meshes that share the base, fastest in learning first, each with its estimated bytes per chip."""
    train, scheme = config.train, pick_scheme(config.model, slice_.chip, training=True)
    tokens = float(train.max_buffer_tokens)
    for choice in candidates(model, config.lora, slice_, tokens, train.buffer_multiple, "lora", scheme):
        mesh = choice.mesh
        if mesh.fsdp == 1 and choice.remat == config.model.remat and choice.buffers == 1:
            shards = slice_.n_chips if mesh.tensor * max(mesh.expert, 1) == 1 else 1
            cache = cache_bytes(config, model, longest, shards) / slice_.n_chips
            yield choice, max(choice.memory, choice.resting + cache)


def sampling_form(spec: ModelSpec, mesh: jax.sharding.Mesh) -> tuple[ModelSpec, jax.sharding.Mesh]:
    """The model's form for sampling, and its mesh: the learner's own, or another one for a copy."""
    form = decode_form(spec, mesh, merge=False)
    size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(form.abstract_base))
    experts = spec.config.experts.num_experts if spec.config.experts else 1
    mesh = decode_mesh(mesh, spec.config.num_key_value_heads, experts, size, shares=True)
    return decode_form(spec, mesh, merge=False), mesh


def moved(base: Tree, weights: Tree) -> list[Any]:
    """The abstract weights that are not in the base, or are placed differently there."""
    own = dict(jax.tree_util.tree_leaves_with_path(base))
    return [
        x
        for path, x in jax.tree_util.tree_leaves_with_path(weights)
        if path not in own or not x.sharding.is_equivalent_to(own[path].sharding, x.ndim)
    ]


def shares_prompts(config: RunConfig, mesh: jax.sharding.Mesh) -> bool:
    """Whether the learner computes a prompt once for all its answers: only with packed rows on one device."""
    return config.rl.share_prompts and config.train.layout == "packed" and mesh.size == 1


def is_dense(backend: str) -> bool:
    """Whether attention spends time on pairs of positions in different rows. Only cuDNN skips their blocks;
    splash skips just those that the causal mask excludes."""
    return not backend.startswith("cudnn")


def sampling_of(rl: RLConfig) -> Sampling:
    """The sampling settings for answers."""
    return Sampling(rl.temperature, logprobs=True)


def cache_length(longest: int) -> int:
    """Positions in a slot's KV cache."""
    return round_up(longest, WINDOW_MULTIPLE)


def cache_bytes(config: RunConfig, model: ModelConfig, longest: int, shards: int) -> int:
    """Bytes of keys and values on all devices together."""
    width = 2 if config.model.dtype == "bfloat16" else 4
    token = 2 * model.num_key_value_heads * model.head_dim * model.num_hidden_layers * width
    return slots_of(config, shards) * cache_length(longest) * token


def slots_of(config: RunConfig, shards: int) -> int:
    """The number of answers decoded at once, on all devices together.

    Args:
      shards: number of devices with slots of their own.
    """
    return min(config.rl.slots * shards, round_up(config.rl.prompts * config.rl.group, shards))
