"""Qwen3 (dense) in Flax NNX, with a LoRA adapter in every projection that has one.

The modules say what is computed and hold weights as `[out, in]`, the layout of Hugging Face files. Right
after construction the model is split once into the trainable adapter and the frozen base, and from there
on everything is a plain pytree:

    spec = ModelSpec(model_config, lora_config)
    lora, frozen = init_lora(spec, seed=0), load_base("path/to/Qwen3-8B", spec, mesh)
    hidden, _ = spec.bind(lora, frozen)(tokens, positions, attend)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from jaxlora.config import LoraConfig, Remat
from jaxlora.models.spec import ModelConfig
from jaxlora.models.table import GROUPS, Weight, parameter_table
from jaxlora.sharding import constrain, gather_again, gathered

Tree = dict[str, Any]
PRODUCT = "product"  # the name of what `_keep_products` keeps
# attend(q, k, v, cache) -> (output [batch, length, heads, head_dim], new cache)
Attend = Callable[[jax.Array, jax.Array, jax.Array, Any], tuple[jax.Array, Any]]


class RMSNorm(nnx.Module):
    """x / rms(x) in float32, back to x's dtype, times the weight."""

    def __init__(self, size: int, eps: float, dtype: jnp.dtype, stack: tuple[int, ...] = ()):
        self.weight = nnx.Param(jnp.zeros((*stack, size), dtype))
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + self.eps)
        return self.weight[...] * y.astype(x.dtype)


class Linear(nnx.Module):
    """y = W x, plus (alpha / r) B A x where the projection is adapted.

    W `[out, in]` is frozen in the base's dtype. A `[r, in]` and B `[out, r]` are float32, trained, and cast
    to the activations' dtype for the product. In a group both have a leading member axis, and line i of the
    batch is computed with the adapter of member i % members.
    """

    def __init__(
        self,
        weight: Weight,
        dtype: jnp.dtype,
        lora: LoraConfig | None,
        scales: tuple[float, ...],
        stack: tuple[int, ...] = (),
    ):
        out_size, in_size = weight.shape
        self.weight = nnx.Param(jnp.zeros((*stack, out_size, in_size), dtype))
        if lora is not None and is_adapted(weight, lora):
            self.lora_a = nnx.LoRAParam(jnp.zeros((*stack, lora.rank, in_size), jnp.float32))
            self.lora_b = nnx.LoRAParam(jnp.zeros((*stack, out_size, lora.rank), jnp.float32))
        else:
            self.lora_a = self.lora_b = None  # type: ignore[assignment]
        self.axes, self.stacked, self.scales = weight.axes, bool(stack), scales

    def __call__(self, x: jax.Array) -> jax.Array:
        return joint_products(x, self)[0]


def joint_products(x: jax.Array, *linears: Linear) -> list[jax.Array]:
    """The products of several projections with one input; all of them are adapted, or none is.

    Their adapters read the input together: one product with all A, and one for its gradient.
    """
    arrays = [[p[...] for p in (one.weight, one.lora_a, one.lora_b) if p is not None] for one in linears]
    function = partial(_products, [one.axes for one in linears], linears[0].scales)
    ys = gather_again(function, in_loop=linears[0].stacked)(x, arrays)
    return [checkpoint_name(y, PRODUCT) for y in ys]


def _products(axes, scales, x, arrays) -> list[jax.Array]:
    """W x, plus (alpha / r) B A x where adapted, of each projection; its arrays are [W] or [W, A, B]."""
    weights, *adapters = zip(*arrays, strict=True)
    ys = [jnp.einsum("...i,oi->...o", x, gathered(w, own)) for w, own in zip(weights, axes, strict=True)]
    if not adapters:
        return ys
    return [y + delta for y, delta in zip(ys, _deltas(axes, scales, x, *adapters), strict=True)]


def _deltas(axes, scales, x, all_a, all_b) -> list[jax.Array]:
    """(alpha / r) B A x of each projection."""

    def ready(matrix, *own):
        # One adapter alone is a group of one: the compiler drops an axis of length one.
        return gathered(matrix.astype(x.dtype).reshape(-1, *matrix.shape[-2:]), (None, *own))

    a = [ready(a, None, in_axis) for a, (_, in_axis) in zip(all_a, axes, strict=True)]
    b = [ready(b, out_axis, None) for b, (out_axis, _) in zip(all_b, axes, strict=True)]
    # Members first, as products in batches have them: the other order costs a transpose a product.
    of_member = x.reshape(-1, len(a[0]), *x.shape[1:]).swapaxes(0, 1)
    low = jnp.einsum("m...i,mri->m...r", of_member, jnp.concatenate(a, axis=1))
    low = checkpoint_name(low, PRODUCT) * jnp.asarray(scales, x.dtype).reshape(-1, *(1,) * (low.ndim - 1))
    lows = jnp.split(low, len(b), axis=-1)
    deltas = [jnp.einsum("m...r,mor->m...o", *pair) for pair in zip(lows, b, strict=True)]
    return [delta.swapaxes(0, 1).reshape(*x.shape[:-1], -1) for delta in deltas]


class Attention(nnx.Module):
    """Grouped-query attention with RMS-normalised queries and keys and rotary positions."""

    def __init__(self, make_linear, make_norm, config: ModelConfig, joined: bool):
        if joined:
            self.qkv_proj = make_linear("layers.self_attn.qkv_proj")
        else:
            self.q_proj = make_linear("layers.self_attn.q_proj")
            self.k_proj = make_linear("layers.self_attn.k_proj")
            self.v_proj = make_linear("layers.self_attn.v_proj")
        self.o_proj = make_linear("layers.self_attn.o_proj")
        self.q_norm, self.k_norm = make_norm(config.head_dim), make_norm(config.head_dim)
        self.head_dim, self.joined = config.head_dim, joined
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads

    def project(self, x):
        """Queries, keys and values `[batch, length, heads or kv_heads, head_dim]`."""

        def heads(y):
            return y.reshape(*y.shape[:-1], -1, self.head_dim)

        if self.joined:
            return jnp.split(heads(self.qkv_proj(x)), [self.heads, self.heads + self.kv_heads], axis=-2)
        return map(heads, joint_products(x, self.q_proj, self.k_proj, self.v_proj))

    def __call__(self, x, rotary, attend: Attend, cache):
        q, k, v = self.project(x)
        q, k = rotate(self.q_norm(q), rotary), rotate(self.k_norm(k), rotary)
        y, cache = attend(q, k, v, cache)
        return self.o_proj(y.reshape(*x.shape[:-1], -1)), cache


class MLP(nnx.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, make_linear, joined: bool):
        if joined:
            self.gate_up_proj = make_linear("layers.mlp.gate_up_proj")
        else:
            self.gate_proj = make_linear("layers.mlp.gate_proj")
            self.up_proj = make_linear("layers.mlp.up_proj")
        self.down_proj = make_linear("layers.mlp.down_proj")
        self.joined = joined

    def __call__(self, x):
        if self.joined:
            gate, up = jnp.split(self.gate_up_proj(x), 2, axis=-1)
        else:
            gate, up = joint_products(x, self.gate_proj, self.up_proj)
        return self.down_proj(jax.nn.silu(gate) * up)


class DecoderLayer(nnx.Module):
    """Pre-norm attention and MLP, each added to the residual stream."""

    def __init__(self, make_linear, make_norm, config: ModelConfig, joined: bool):
        self.input_layernorm = make_norm(config.hidden_size)
        self.self_attn = Attention(make_linear, make_norm, config, joined)
        self.post_attention_layernorm = make_norm(config.hidden_size)
        self.mlp = MLP(make_linear, joined)

    def __call__(self, x, rotary, attend: Attend, cache):
        y, cache = self.self_attn(self.input_layernorm(x), rotary, attend, cache)
        x = constrain(x + y, "batch", "length", None)
        x = x + self.mlp(self.post_attention_layernorm(x))
        return constrain(x, "batch", "length", None), cache


class Embedding(nnx.Module):
    """Token embeddings `[vocab, hidden]`."""

    def __init__(self, weight: Weight, dtype: jnp.dtype):
        self.weight = nnx.Param(jnp.zeros(weight.shape, dtype))

    def __call__(self, tokens: jax.Array) -> jax.Array:
        # Every chip looks up all tokens of its copy of the base in its own columns; then the parts change
        # places. The table itself is never gathered.
        copy = ("batch_of_copy", "length_of_copy")
        rows = jnp.take(self.weight[...], constrain(tokens, *copy), axis=0, mode="clip")
        return constrain(constrain(rows, *copy, "embed"), "batch", "length", None)


class Qwen3(nnx.Module):
    """The whole model. Its layers are one stacked `DecoderLayer` (scanned) or a list of them (unrolled)."""

    def __init__(self, spec: ModelSpec):
        config, lora, dtype, scales = spec.config, spec.lora, jnp.dtype(spec.dtype), spec.scales
        table = {w.path: w for w in spec.table}

        def make_layer(stack: tuple[int, ...]) -> DecoderLayer:
            return DecoderLayer(
                lambda path: Linear(table[path], dtype, lora, scales, stack),
                lambda size: RMSNorm(size, config.rms_norm_eps, dtype, stack),
                config,
                spec.joined,
            )

        depth = config.num_hidden_layers
        self.embed_tokens = Embedding(table["embed_tokens"], dtype)
        self.layers: Any = (
            make_layer((depth,)) if spec.scan else nnx.List([make_layer(()) for _ in range(depth)])
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype)
        tied = config.tie_word_embeddings
        self.lm_head = None if tied else Linear(table["lm_head"], dtype, lora, scales)
        self.head_dim, self.rope_theta, self.scan = config.head_dim, config.rope_theta, spec.scan
        self.scales = scales

    def __call__(self, tokens, positions, attend: Attend, cache=None, *, remat: Remat = False):
        """Hidden states after the last norm.

        Args:
          tokens, positions: int32 `[batch, length]`; a row's positions start at 0.
          attend: attention over the current keys and values and the layer's cache.
          cache: None, or one entry a layer: a list (unrolled) or a tree with a leading layer axis (scanned).
          remat: what the backward pass computes again: nothing, the activations of each layer (True), or
            only those that are no product and no attention (`elementwise`): a third of the memory.

        Returns:
          hidden states `[batch, length, hidden]` and the new cache, in the form of `cache`.
        """
        x = self.embed_tokens(tokens)
        rotary = rotary_angles(positions, self.head_dim, self.rope_theta)
        definition, state = nnx.split(self.layers if self.scan else self.layers[0])

        def layer(x, state, cache):
            return nnx.merge(definition, state)(x, rotary, attend, cache)

        if remat:
            keep = _keep_products if remat == "elementwise" else jax.checkpoint_policies.nothing_saveable
            layer = jax.checkpoint(layer, policy=keep)
        if self.scan:
            x, cache = jax.lax.scan(lambda x, inputs: layer(x, *inputs), x, (state, cache))
        else:
            entries = []
            for i, module in enumerate(self.layers):
                x, entry = layer(x, nnx.state(module), None if cache is None else cache[i])
                entries.append(entry)
            cache = entries
        return self.norm(x), cache

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Logits `[..., vocab]` in the activations' dtype, summed in float32."""
        if self.lm_head is not None:
            return self.lm_head(hidden)
        return jnp.einsum("...i,oi->...o", hidden, self.embed_tokens.weight[...])


def _keep_products(primitive: Any, *_: Any, **params: Any) -> bool:
    """Whether the backward pass finds this result kept: products, and what attention kernels made."""
    kernels = ("pallas_call", "dot_product_attention_fwd_wrapper")
    return primitive.name in kernels or params.get("name") == PRODUCT


def kept_per_token(config: ModelConfig, remat: Remat) -> tuple[int, int]:
    """Numbers that the backward pass of one layer finds kept for one token, counted from the shapes.

    The first are whole on every chip of a mesh, the second split over `tensor`. All: the residual stream
    twice, each norm's input in float32, its output and its scaled output; queries, keys, values before and
    after their norms, attention output, the MLP's hidden units. Elementwise: only what products and
    attention made. With full recomputation: the layer's input.
    """
    heads, kv_heads = (n * config.head_dim for n in (config.num_attention_heads, config.num_key_value_heads))
    if remat is True:
        return config.hidden_size, 0
    if remat == "elementwise":
        return 3 * config.hidden_size, 2 * heads + 2 * kv_heads + 2 * config.intermediate_size
    return 12 * config.hidden_size, 4 * heads + 5 * kv_heads + 4 * config.intermediate_size


def rotary_angles(positions: jax.Array, head_dim: int, theta: float) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine, float32 `[batch, length, 1, head_dim / 2]`, of position / theta^(2i / head_dim)."""
    # Rounded on the host, in the order of Hugging Face: at position 10,000 one differing last bit of a
    # frequency turns its pair by a milliradian, and a compiled power differs in the last bit.
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    power = np.power(np.float64(theta), exponents.astype(np.float64)).astype(np.float32)
    frequency = np.float32(1) / power
    angles = positions.astype(jnp.float32)[..., None, None] * frequency
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: jax.Array, rotary: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Turn the pairs (i, i + head_dim / 2) of x `[batch, length, heads, head_dim]`, in float32."""
    cos, sin = rotary
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x.dtype)


def is_adapted(weight: Weight, lora: LoraConfig) -> bool:
    """Whether the condition (or the output-head switch) gives this weight an adapter."""
    if weight.lora_group == "output_head":
        return lora.output_head
    return weight.lora_group in GROUPS[lora.condition]


@dataclass(frozen=True)
class ModelSpec:
    """Everything static about a model: shapes, adapter placement, dtype and layer form. Hashable.

    `member_scales` makes it the spec of a group trained together (see `jaxlora.train.fused`): alpha / r of
    each member. The arrays of its adapters have a leading member axis.
    """

    config: ModelConfig
    lora: LoraConfig | None = None
    dtype: str = "bfloat16"
    scan: bool = True
    member_scales: tuple[float, ...] = ()  # of a group; empty: one adapter
    joined: bool = False  # q, k, v and gate, up are one matrix each; without an adapter only

    @property
    def scales(self) -> tuple[float, ...]:
        """alpha / r of each adapter: one, or one a member."""
        if self.lora is None:
            return ()
        return self.member_scales or (self.lora.alpha / self.lora.rank,)

    @cached_property
    def _split(self):
        assert self.lora is None or not self.joined
        module = nnx.eval_shape(lambda: Qwen3(self))
        definition, lora, frozen = nnx.split(module, nnx.LoRAParam, ...)  # type: ignore[misc]
        return definition, nnx.to_pure_dict(lora), nnx.to_pure_dict(frozen)

    @property
    def abstract_frozen(self) -> Tree:
        """Shapes and dtypes of the frozen base, as `jax.ShapeDtypeStruct`."""
        return self._split[2]

    @property
    def table(self) -> list[Weight]:
        return parameter_table(self.config, self.joined)

    @property
    def adapted(self) -> list[Weight]:
        """The weights that carry an adapter."""
        return [] if self.lora is None else [w for w in self.table if is_adapted(w, self.lora)]

    def bind(self, lora: Tree, frozen: Tree) -> Qwen3:
        """The callable module over these arrays. The adapter's layer axis is stacked in either form."""
        if self.member_scales and "layers" in lora:  # members first in the state, layers first in the model
            lora = {**lora, "layers": jax.tree.map(lambda x: x.swapaxes(0, 1), lora["layers"])}
        if not self.scan and "layers" in lora:
            depth = self.config.num_hidden_layers
            layers = {i: jax.tree.map(lambda x, i=i: x[i], lora["layers"]) for i in range(depth)}
            lora = {**lora, "layers": layers}
        return nnx.merge(self._split[0], lora, frozen)
