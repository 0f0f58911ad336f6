"""The decoder in Flax NNX, for every family: pre-norm attention and SwiGLU, with adapters where asked for.

The modules say what is computed and hold weights as `[out, in]`, the layout of Hugging Face files. Right
after construction the model is split once into what is trained and what is frozen, and from there on
everything is a plain pytree:

    spec = ModelSpec(model_config, lora_config)            # or ModelSpec(model_config, full=True)
    lora, frozen = init_lora(spec, seed=0), load_base("path/to/Qwen3-8B", spec, mesh)
    hidden, _ = spec.bind(lora, frozen)(tokens, positions, attend)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from jaxlora.config import LoraConfig, Remat
from jaxlora.models.dropout import Noise, dropped
from jaxlora.models.experts import ExpertMLP
from jaxlora.models.families import parameter_table, rotary_frequencies
from jaxlora.models.grouped import rows_of
from jaxlora.models.quantised import Scheme, abstract, fused_products, fuses, products
from jaxlora.models.spec import GROUPS, JOINED, PRODUCT, AdapterShape, How, ModelConfig, Weight, tied_head
from jaxlora.runtime.errors import UserError
from jaxlora.sharding import (
    array_axes,
    constrain,
    dotted,
    embedded,
    gather_again,
    gathered,
    gathered_adapter,
)

Tree = dict[str, Any]
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

    W `[out, in]` has the model's dtype, as the bias `[out]` of a family that has one, or is quantised. A
    `[r, in]` and B `[out, r]` are float32, trained, and cast to the activations' dtype for the product.
    """

    def __init__(self, weight: Weight, spec: ModelSpec, stack: tuple[int, ...] = (), bias: bool = False):
        out_size, in_size = weight.shape
        self.weight = nnx.Param(jnp.zeros((*stack, out_size, in_size), jnp.dtype(spec.dtype)))
        if spec.lora is not None and is_adapted(weight, spec.lora):
            self.lora_a = nnx.LoRAParam(jnp.zeros((*stack, spec.lora.rank, in_size), jnp.float32))
            self.lora_b = nnx.LoRAParam(jnp.zeros((*stack, out_size, spec.lora.rank), jnp.float32))
        else:
            self.lora_a = self.lora_b = None  # type: ignore[assignment]
        self.bias = nnx.Param(jnp.zeros((*stack, out_size), jnp.dtype(spec.dtype))) if bias else None
        self.axes, self.stacked, self.scale, self.path = weight.axes, bool(stack), spec.scale, weight.path

    def __call__(self, x: jax.Array, noise: Noise | None = None) -> jax.Array:
        return joint_products(x, self, noise=noise)[0]


class TiedHead(nnx.Module):
    """The adapter of an output head that is the embedding: A and B without a weight of their own."""

    def __init__(self, weight: Weight, spec: ModelSpec):
        assert spec.lora is not None
        out_size, in_size = weight.shape
        self.lora_a = nnx.LoRAParam(jnp.zeros((spec.lora.rank, in_size), jnp.float32))
        self.lora_b = nnx.LoRAParam(jnp.zeros((out_size, spec.lora.rank), jnp.float32))
        self.weight, self.axes, self.scale = None, weight.axes, spec.scale

    def delta(self, x: jax.Array) -> jax.Array:
        """(alpha / r) B A x."""
        return _deltas([self.axes], self.scale, x, [self.lora_a[...]], [self.lora_b[...]])[0]


def joint_products(x: jax.Array, *linears: Linear, noise: Noise | None = None) -> list[jax.Array]:
    """The products of several projections with one input.

    Their adapters read the input together: one product with all A, and one for its gradient. With `noise`
    each reads what its own dropout leaves of the input.
    """
    if (ys := _fused(x, linears, noise)) is None:
        ys = _unfused(x, linears, noise)
    return [y if one.bias is None else y + one.bias[...] for one, y in zip(linears, ys, strict=True)]


def gated_product(x: jax.Array, gate: Linear, up: Linear, noise: Noise | None = None) -> jax.Array:
    """silu(gate(x)) * up(x)."""
    if gate.bias is up.bias is None and (ys := _fused(x, (gate, up), noise, gated=True)) is not None:
        return ys[0]
    gated, ungated = joint_products(x, gate, up, noise=noise)
    return jax.nn.silu(gated) * ungated


def _fused(x, linears: Sequence[Linear], noise: Noise | None, gated: bool = False) -> list[jax.Array] | None:
    """`fused_products` of these projections, where it serves them."""
    if noise is not None or any(one.lora_a is None for one in linears):
        return None
    weights: list[Any] = [one.weight.get_value() for one in linears]
    all_b = [one.lora_b[...] for one in linears]
    if not fuses(x, weights, [b.shape[1] for b in all_b]):
        return None
    a = jnp.concatenate([one.lora_a[...].astype(x.dtype) for one in linears])
    return fused_products(x, weights, a, [b.astype(x.dtype) for b in all_b], linears[0].scale, gated)


def _unfused(x, linears: Sequence[Linear], noise: Noise | None) -> list[jax.Array]:
    weights = [one.weight.get_value() for one in linears]
    adapted = [i for i, one in enumerate(linears) if one.lora_a is not None]
    adapters = [(linears[i].lora_a[...], linears[i].lora_b[...]) for i in adapted]
    drops = None if noise is None else [linears[i].path for i in adapted]
    rate = 0.0 if noise is None else noise.rate
    function = partial(_products, tuple(one.axes for one in linears), adapted, linears[0].scale, drops, rate)
    words = () if noise is None else (noise.words,)
    ys = gather_again(function, in_loop=linears[0].stacked)(x, weights, adapters, *words)
    return [checkpoint_name(y, PRODUCT) for y in ys]


def _products(axes, adapted, scale, drops, rate, x, weights, adapters, words=None) -> list[jax.Array]:
    """W x of each projection, plus (alpha / r) B A x of those whose numbers are in `adapted`."""
    ys = products(x, [_gathered(w, own) for w, own in zip(weights, axes, strict=True)])
    if adapted:
        own = [axes[i] for i in adapted], scale, x, *zip(*adapters, strict=True)
        deltas = _deltas(*own) if drops is None else _dropped_deltas(drops, Noise(words, rate), *own)
        for i, delta in zip(adapted, deltas, strict=True):
            ys[i] += delta
    return ys


def _gathered(weight, axes):
    return jax.tree.map_with_path(lambda path, x: gathered(x, array_axes(path, axes)), weight)


def _deltas(axes, scale, x, all_a, all_b) -> list[jax.Array]:
    """(alpha / r) B A x of each projection."""
    a = [gathered_adapter(a.astype(x.dtype), (None, own[1])) for a, own in zip(all_a, axes, strict=True)]
    b = [gathered_adapter(b.astype(x.dtype), (own[0], None)) for b, own in zip(all_b, axes, strict=True)]
    low = checkpoint_name(jnp.einsum("...i,ri->...r", x, jnp.concatenate(a)), PRODUCT)
    lows = jnp.split(low * jnp.asarray(scale, x.dtype), len(b), axis=-1)
    return [jnp.einsum("...r,or->...o", *pair) for pair in zip(lows, b, strict=True)]


def _dropped_deltas(paths, noise: Noise, axes, scale, x, all_a, all_b) -> list[jax.Array]:
    """The same where each module drops inputs of its own; the backward pass draws its masks again."""
    dropping = jax.checkpoint(
        lambda x, words, path: dropped(x, Noise(words, noise.rate), path), static_argnums=2
    )
    return [
        _deltas([own], scale, dropping(x, noise.words, path), [a], [b])[0]
        for path, own, a, b in zip(paths, axes, all_a, all_b, strict=True)
    ]


class Attention(nnx.Module):
    """Grouped-query attention with rotary positions, and RMS-normalised queries and keys in some families."""

    def __init__(self, make_linear, make_norm, config: ModelConfig, joined: bool, qk_norms: bool):
        if joined:
            self.qkv_proj = make_linear("layers.self_attn.qkv_proj")
        else:
            self.q_proj = make_linear("layers.self_attn.q_proj")
            self.k_proj = make_linear("layers.self_attn.k_proj")
            self.v_proj = make_linear("layers.self_attn.v_proj")
        self.o_proj = make_linear("layers.self_attn.o_proj")
        self.q_norm = make_norm(config.head_dim) if qk_norms else None
        self.k_norm = make_norm(config.head_dim) if qk_norms else None
        self.head_dim, self.joined = config.head_dim, joined
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads

    def project(self, x, noise):
        """Queries, keys and values `[batch, length, heads or kv_heads, head_dim]`."""

        def heads(y):
            return y.reshape(*y.shape[:-1], -1, self.head_dim)

        if self.joined:
            return jnp.split(heads(self.qkv_proj(x)), [self.heads, self.heads + self.kv_heads], axis=-2)
        return map(heads, joint_products(x, self.q_proj, self.k_proj, self.v_proj, noise=noise))

    def __call__(self, x, rotary, attend: Attend, cache, noise):
        q, k, v = self.project(x, noise)
        normed = ((q, self.q_norm), (k, self.k_norm))
        q, k = (rotate(x if norm is None else norm(x), rotary) for x, norm in normed)
        y, cache = attend(q, k, v, cache)
        return self.o_proj(y.reshape(*x.shape[:-1], -1), noise), cache


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

    def __call__(self, x, noise, real=None):
        if self.joined:
            gate, up = jnp.split(self.gate_up_proj(x), 2, axis=-1)
            return self.down_proj(jax.nn.silu(gate) * up, noise)
        return self.down_proj(gated_product(x, self.gate_proj, self.up_proj, noise), noise)


class DecoderLayer(nnx.Module):
    """Pre-norm attention and MLP, each added to the residual stream."""

    def __init__(self, make_linear, make_norm, make_mlp, config: ModelConfig, joined: bool, qk_norms: bool):
        self.input_layernorm = make_norm(config.hidden_size)
        self.self_attn = Attention(make_linear, make_norm, config, joined, qk_norms)
        self.post_attention_layernorm = make_norm(config.hidden_size)
        self.mlp = make_mlp()

    def __call__(self, x, rotary, attend: Attend, cache, noise, real):
        y, cache = self.self_attn(self.input_layernorm(x), rotary, attend, cache, noise)
        x = constrain(x + y, "batch", "length", None)
        x = x + self.mlp(self.post_attention_layernorm(x), noise, real)
        return constrain(x, "batch", "length", None), cache


class Embedding(nnx.Module):
    """Token embeddings `[vocab, hidden]`."""

    def __init__(self, weight: Weight, dtype: jnp.dtype):
        self.weight = nnx.Param(jnp.zeros(weight.shape, dtype))

    def __call__(self, tokens: jax.Array) -> jax.Array:
        return embedded(self.weight[...], tokens)


class Decoder(nnx.Module):
    """The whole model. Its layers are one stacked `DecoderLayer` (scanned) or a list of them (unrolled)."""

    def __init__(self, spec: ModelSpec):
        config, dtype = spec.config, jnp.dtype(spec.dtype)
        table = {w.path: w for w in spec.table if w.array == "weight"}
        biased = {w.path for w in spec.table if w.array == "bias"}

        def make_layer(stack: tuple[int, ...]) -> DecoderLayer:
            def make_linear(path: str) -> Linear:
                return Linear(table[path], spec, stack, path in biased)

            def make_mlp() -> MLP | ExpertMLP:
                return ExpertMLP(table, spec, stack) if config.experts else MLP(make_linear, spec.joined)

            return DecoderLayer(
                make_linear,
                lambda size: RMSNorm(size, config.rms_norm_eps, dtype, stack),
                make_mlp,
                config,
                spec.joined,
                "layers.self_attn.q_norm" in table,
            )

        depth = config.num_hidden_layers
        self.embed_tokens = Embedding(table["embed_tokens"], dtype)
        self.layers: Any = (
            make_layer((depth,)) if spec.scan else nnx.List([make_layer(()) for _ in range(depth)])
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype)
        self.lm_head = self._head(spec, table)
        self.config, self.scan = config, spec.scan

    @staticmethod
    def _head(spec: ModelSpec, table: dict[str, Weight]) -> Any:
        """The head's own matrix; of a tied model, its adapter or None."""
        if "lm_head" in table:
            return Linear(table["lm_head"], spec)
        return None if spec.mergeable else TiedHead(tied_head(spec.config), spec)

    def __call__(
        self,
        tokens,
        positions,
        attend: Attend,
        cache=None,
        *,
        remat: Remat = False,
        noise: Noise | None = None,
        real: jax.Array | None = None,
    ):
        """Hidden states after the last norm.

        Args:
          tokens, positions: int32 `[batch, length]`; a row's positions start at 0.
          attend: attention over the current keys and values and the layer's KV cache.
          cache: None, or one entry a layer: a list (unrolled) or a tree with a leading layer axis (scanned).
          remat: what the backward pass computes again: nothing, the activations of each layer (True), or
            only those that are no product and no attention (`elementwise`): a third of the memory.
          noise: what the adapters' dropout is drawn from; None: nothing is dropped.
          real: bool `[batch, length]`: the tokens that go to experts, in a model that has them; None: all.

        Returns:
          hidden states `[batch, length, hidden]` and the new cache, in the form of `cache`.
        """
        x = self.embed_tokens(tokens)
        rotary = rotary_angles(positions, rotary_frequencies(self.config))

        def call(definition, x, state, cache, layer):
            own = None if noise is None else noise.of_layer(layer)
            return nnx.merge(definition, state)(x, rotary, attend, cache, own, real)

        if remat:
            keep = _keep_products if remat == "elementwise" else jax.checkpoint_policies.nothing_saveable
            call = jax.checkpoint(call, policy=keep, static_argnums=0)
        if self.scan:
            definition, state = nnx.split(self.layers)
            layers = None if noise is None else jnp.arange(self.config.num_hidden_layers)
            x, cache = jax.lax.scan(lambda x, inputs: call(definition, x, *inputs), x, (state, cache, layers))
        else:
            entries = []
            call = jax.jit(call, static_argnums=0)  # traced once for all layers, which differ in numbers only
            for i, module in enumerate(self.layers):
                definition, state = nnx.split(module)
                own = None if cache is None else cache[i], None if noise is None else i
                x, entry = call(definition, x, state, *own)
                entries.append(entry)
            cache = entries
        return self.norm(x), cache

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Logits `[..., vocab]` in the activations' dtype, summed in float32."""
        head = self.lm_head
        if head is not None and head.weight is not None:
            return head(hidden)
        logits = jnp.einsum("...i,oi->...o", hidden, self.embed_tokens.weight[...])
        return logits if head is None else logits + head.delta(hidden)


def _keep_products(primitive: Any, *_: Any, **params: Any) -> bool:
    """Whether the backward pass finds this result kept: products, and what attention kernels made."""
    kernels = ("pallas_call", "dot_product_attention_fwd_wrapper")
    return primitive.name in kernels or params.get("name") == PRODUCT


def kept_per_token(config: ModelConfig, remat: Remat, tokens: int, ways: int = 1) -> tuple[float, float]:
    """Numbers that the backward pass of one layer finds kept for one token, counted from the shapes.

    The first are whole on every chip of a mesh, the second split over `tensor`. All: the residual stream
    twice, each norm's input in float32, its output and its scaled output; queries, keys, values before and
    after their norms, attention output, the MLP's hidden units. Elementwise: only what products and
    attention made. With full recomputation: the layer's input. A family without norms of queries and keys
    keeps a little less. Of experts, states before and after and hidden units, for each row that there is room
    for: a token's choices, and what fills the tiles of every expert.

    Args:
      tokens: of one chip.
      ways: over how many chips experts are split; each has room for the rows of all of their tokens.
    """
    heads, kv_heads = (n * config.head_dim for n in (config.num_attention_heads, config.num_key_value_heads))
    if remat is True:
        return config.hidden_size, 0
    if config.experts is None:
        rows, ffn, units = 0.0, float(config.intermediate_size), 4
    else:
        rows = rows_of(config.experts, tokens, ways) / tokens
        ffn, units = rows * config.experts.moe_intermediate_size, 6
    if remat == "elementwise":
        return (3 + rows) * config.hidden_size, 2 * heads + 2 * kv_heads + 2 * ffn
    return (12 + 2 * rows) * config.hidden_size, 4 * heads + 5 * kv_heads + units * ffn


def rotary_angles(positions: jax.Array, frequencies: np.ndarray) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine, float32 `[batch, length, 1, head_dim / 2]`, of position times frequency."""
    angles = positions.astype(jnp.float32)[..., None, None] * frequencies
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: jax.Array, rotary: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Turn the pairs (i, i + head_dim / 2) of x `[batch, length, heads, head_dim]`, in float32."""
    cos, sin = rotary
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x.dtype)


def is_adapted(weight: Weight, lora: LoraConfig) -> bool:
    """Whether the placement (or the output-head switch) gives this weight an adapter."""
    if weight.lora_group is None:
        return False
    if weight.lora_group == "output_head":
        return lora.output_head or weight.name in lora.modules
    return weight.lora_group in GROUPS.get(lora.targets, ()) or weight.name in lora.modules  # type: ignore[call-overload]


@dataclass(frozen=True)
class ModelSpec:
    """Everything static about a model: shapes, what is trained, dtype and layer form. Hashable.

    With `lora` the adapters are trained over a frozen base. With `full` all weights are trained: the trained
    tree holds float32 master weights, and the model computes with copies in `dtype`. With neither, nothing
    is trained.
    """

    config: ModelConfig
    lora: LoraConfig | None = None
    dtype: str = "bfloat16"  # of computing, and of the frozen base
    scan: bool = True
    joined: bool = False  # q, k, v and gate, up are one matrix each, in decoding only
    full: bool = False
    shapes: tuple[AdapterShape, ...] = ()  # of an adapter whose ranks or scales differ; empty: one of each
    products: How = "auto"  # how experts' products are computed
    scheme: Scheme | None = None  # of a quantised base's projections; None: in `dtype`

    @property
    def scale(self) -> float:
        """alpha / r of the adapter; 0 without one."""
        return 0.0 if self.lora is None else self.lora.alpha / self.lora.rank

    @property
    def expert_rank(self) -> int:
        """Rank of each expert's adapter: that of the adapter, divided by the experts that a token goes to."""
        if self.lora is None or self.config.experts is None:
            return 0
        return self.lora.rank // self.config.experts.num_experts_per_tok

    @property
    def expert_scale(self) -> float:
        """alpha / r of an expert's adapter; 0 without one; 1 where `shapes` says each layer's."""
        if self.shapes:
            return 1.0
        return self.lora.alpha / self.expert_rank if self.lora and self.expert_rank else 0.0

    def _quantised(self, base: Tree) -> Tree:
        """Shapes of the base with quantised ones in place of those that are quantised."""
        if self.scheme is not None and self.config.experts:
            raise UserError("config.model.base_dtype: a base with experts is not rounded; give none")
        places = {weight.place: self.scheme_of(weight) for weight in self.table}

        def form(path, x):
            scheme = places[dotted(path)]
            return x if scheme is None else abstract(scheme, x)

        return jax.tree.map_with_path(form, base)

    @property
    def abstract_base(self) -> Tree:
        """Shapes and dtypes of the base's weights, as `jax.ShapeDtypeStruct`."""
        return _split(self)[1]

    @property
    def table(self) -> list[Weight]:
        return parameter_table(self.config, self.joined)

    @property
    def adaptable(self) -> list[Weight]:
        """The weights that can carry an adapter: of the table, and the tied head's use of the embedding."""
        head = [tied_head(self.config)] if self.config.tie_word_embeddings else []
        return [weight for weight in self.table if weight.lora_group] + head

    @property
    def adapted(self) -> list[Weight]:
        """The weights that carry an adapter."""
        return [] if self.lora is None else [w for w in self.adaptable if is_adapted(w, self.lora)]

    @property
    def mergeable(self) -> bool:
        """Whether the adapter can be folded into the weights: not one on a tied head, whose matrix is also
        the embedding."""
        return not (self.config.tie_word_embeddings and any(w.name == "lm_head" for w in self.adapted))

    def scheme_of(self, weight: Weight) -> Scheme | None:
        """How this weight is quantised; only the layers' projections are."""
        return self.scheme if weight.lora_group and weight.stacked and len(weight.shape) == 2 else None

    def ranks(self, weight: Weight) -> tuple[int, ...]:
        """Rank of an adapted weight's adapter in each layer; one number where it is outside the layers."""
        own = next((shape.ranks for shape in self.shapes if shape.path == weight.path), None)
        usual = self.expert_rank if weight.experts else self.lora.rank if self.lora else 0
        return own or (usual,) * self._copies(weight)

    def adapter_size(self, weight: Weight) -> int:
        """Numbers in an adapted weight's adapter, over all layers and experts."""
        return sum(self.ranks(weight)) * sum(weight.shape[-2:]) * max(weight.experts, 1)

    def stored_rank(self, weight: Weight) -> int:
        """Rank of the arrays of an adapted weight's adapter: the largest of any dense weight, or its own."""
        if not weight.experts:
            return self.lora.rank if self.lora else 0
        return max(self.ranks(weight))

    def scales(self, weight: Weight) -> tuple[float, ...]:
        """alpha / rank (or what stands for it) of an adapted weight's adapter in each layer."""
        own = next((shape.scales for shape in self.shapes if shape.path == weight.path), None)
        return own or (self.expert_scale if weight.experts else self.scale,) * self._copies(weight)

    def _copies(self, weight: Weight) -> int:
        return self.config.num_hidden_layers if weight.stacked else 1

    def computing(self, trained: Tree, frozen: Tree) -> tuple[Tree, Tree]:
        """Adapter and weights as the model computes with them: of full training, copies in `dtype`."""
        if not self.full:
            return trained, frozen
        return {}, jax.tree.map(lambda x: x.astype(self.dtype), trained)

    def bind(self, trained: Tree, frozen: Tree) -> Decoder:
        """The callable module over these arrays: an adapter (or `{}`) and the base, or all weights and `{}`.

        The adapter's layer axis is stacked in either form of the layers.
        """
        lora, weights = self.computing(trained, frozen)
        return self.module(self._by_layer(self.with_scales(lora)), weights)

    def module(self, adapter: Tree, weights: Tree) -> Decoder:
        """`bind` of an adapter that is in the form for it already."""
        return nnx.merge(_split(self)[0], adapter, weights)

    def for_steps(self, lora: Tree) -> Tree:
        """An adapter in the form that `module` takes, for many steps of decoding: in the dtype of computing,
        and joined, all A that read one input, as that of its first projection: the others' have no rows."""
        lora = jax.tree.map(lambda x: x.astype(self.dtype), self.with_scales(lora))
        for paths in JOINED.values():
            places = [path.split(".") for path in paths]
            own = [lora.get("layers", {}).get(parent, {}).get(name) for parent, name in places]
            first, *others = [module for module in own if module is not None] or [{}]
            if others:
                first["lora_a"] = jnp.concatenate([module["lora_a"] for module in (first, *others)], axis=1)
            for module in others:
                module["lora_a"] = module["lora_a"][:, :0]
        return self._by_layer(lora)

    def _by_layer(self, lora: Tree) -> Tree:
        """The adapter with its layer axis as the layers are: where they are unrolled, arrays of each."""
        if self.scan or "layers" not in lora:
            return lora
        return {**lora, "layers": unstacked(lora["layers"], self.config.num_hidden_layers)}

    def with_scales(self, lora: Tree) -> Tree:
        """The adapter with each layer's own scale put into A, over the one that the modules multiply with."""
        if not self.shapes:
            return lora
        experts = {weight.path for weight in self.adapted if weight.experts}
        own = {
            shape.path: np.asarray(shape.scales, np.float32)
            / np.float32(self.expert_scale if shape.path in experts else self.scale)
            for shape in self.shapes
        }

        def scaled(path, x):
            factors = own.get(".".join(key.key for key in path[:-1]))
            if factors is None or path[-1].key != "lora_a":
                return x
            return x * factors.reshape(-1, *(1,) * (x.ndim - 1)) if x.ndim > 2 else x * factors[0]

        return jax.tree.map_with_path(scaled, lora)


@cache
def _split(spec: ModelSpec) -> tuple[Any, Tree]:
    """The model's graph, and the shapes of its base; cached, because 36 layers take half a second."""
    assert spec.lora is None or not spec.full
    assert spec.scheme is None or not spec.full
    module = nnx.eval_shape(lambda: Decoder(spec))
    definition, _, base = nnx.split(module, nnx.LoRAParam, ...)  # type: ignore[misc]
    return definition, spec._quantised(nnx.to_pure_dict(base))


def unstacked(layers: Tree, depth: int) -> dict[int, Tree]:
    """Each layer's own arrays of stacked ones.

    Not by indexing: the gradient of a split is one concatenation, that of `depth` indices a sum of as many
    padded arrays, which XLA puts into single kernels that take seconds to compile.
    """
    leaves, structure = jax.tree.flatten(layers)
    pieces = [jax.lax.split(x, (1,) * depth, axis=0) for x in leaves]
    return {i: jax.tree.unflatten(structure, [piece[i][0] for piece in pieces]) for i in range(depth)}
