"""Greedy decoding of many prompts: batched prefill, a static cache, finished rows replaced at once.

    answers = generate(spec, lora, frozen, prompts, eos_ids=(151645,), max_new_tokens=512, slots=256)
    answers[0].tokens, answers[0].stop_reason          # ids up to and with the end-of-turn token, "stop"

The cache has a fixed number of slots. A prompt is prefilled into a free slot; all slots decode together,
several steps a call, with the arg-max and the stop test on the device; a finished slot takes the next
prompt. What a row generates depends on nothing but its own prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxlora.data.packing import choose_sizes, round_up
from jaxlora.models.attention import decode_attention, segment_attention
from jaxlora.models.decoder import Decoder, ModelSpec, Tree
from jaxlora.runtime.devices import decoder_options
from jaxlora.runtime.hosts import whole
from jaxlora.sharding import constrain_decode

STEPS_PER_CALL = 16
PREFILL_ROWS = 32
PROMPT_MULTIPLE = 32  # prompts are padded to a multiple of this many tokens
TAIL_FROM_SLOTS = 256  # with fewer slots a step is bound by reading the weights, however many are idle
WINDOW_MULTIPLE = 128  # the cache is read up to a multiple of this many tokens


@dataclass(frozen=True)
class Generation:
    """One answer: token ids with the end-of-turn token if it came, and `stop` or `length`."""

    tokens: list[int]
    stop_reason: str


class DecodeState(NamedTuple):
    """Everything on the device between calls; one row a slot."""

    cache: list[tuple[jax.Array, jax.Array]]  # a layer: keys, values [slots, length, kv_heads, head_dim]
    lengths: jax.Array  # int32 [slots]: tokens in the cache
    last: jax.Array  # int32 [slots]: the newest token, not yet in the cache
    output: jax.Array  # int32 [slots, max_new_tokens]
    n_new: jax.Array  # int32 [slots]: tokens in `output`
    limit: jax.Array  # int32 [slots]: most tokens of this row
    active: jax.Array  # bool [slots]


@partial(jax.jit, static_argnums=(0, 1, 2, 3))
def init_decode(spec: ModelSpec, slots: int, length: int, max_new_tokens: int) -> DecodeState:
    """An empty cache for `slots` rows of at most `length` tokens, prompt and answer together."""
    config = spec.config
    shape = (slots, length, config.num_key_value_heads, config.head_dim)
    zeros = partial(jnp.zeros, (slots,), jnp.int32)
    state = DecodeState(
        cache=[
            (jnp.zeros(shape, spec.dtype), jnp.zeros(shape, spec.dtype))
            for _ in range(config.num_hidden_layers)
        ],
        lengths=zeros(),
        last=zeros(),
        output=jnp.zeros((slots, max_new_tokens), jnp.int32),
        n_new=zeros(),
        limit=zeros(),
        active=jnp.zeros((slots,), bool),
    )
    return constrain_decode(state)  # made where it stays: the cache is too large for one chip


@lru_cache(maxsize=8)  # one program for every call with the same model
def make_prefill(spec: ModelSpec, eos_ids: tuple[int, ...], backend: str = "xla"):
    """The jitted `(state, lora, frozen, tokens, lengths, slots, limits) -> (state, outputs, counts)`.

    Reads prompts `tokens` `[rows, length]` (int32, padded on the right, true `lengths` `[rows]`) into the
    given slots and picks their first token. `outputs` `[rows, max_new_tokens]` and `counts` `[rows]` are
    what those slots had generated before. A slot number beyond the last marks a filler row.
    """

    def prefill(state: DecodeState, lora: Tree, frozen: Tree, tokens, lengths, slots, limits):
        model = spec.bind(lora, frozen)
        hidden, cache = prefill_hidden(model, state.cache, tokens, lengths, slots, backend)
        final = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)[:, 0]
        first = greedy(model, final)
        old = state.output.at[slots].get(mode="clip"), state.n_new.at[slots].get(mode="clip")

        def put(array, value):
            return array.at[slots].set(value, mode="drop")

        state = DecodeState(
            cache=cache,
            lengths=put(state.lengths, lengths),
            last=put(state.last, first),
            output=state.output.at[slots, 0].set(first, mode="drop"),
            n_new=put(state.n_new, jnp.ones_like(lengths)),
            limit=put(state.limit, limits),
            active=put(state.active, ~_is_end(first, eos_ids) & (limits > 1)),
        )
        return state, *old

    return jax.jit(prefill, donate_argnums=0, compiler_options=decoder_options())


@lru_cache(maxsize=8)
def make_decode(spec: ModelSpec, eos_ids: tuple[int, ...], backend: str = "xla", steps: int = STEPS_PER_CALL):
    """The jitted `(state, lora, frozen, window) -> state`: up to `steps` tokens for every active slot.

    `window` (static) is how much of the cache is read: at least the longest active row after the call. Steps
    without an active slot change nothing; stopping early would make the host read a condition in each.
    """

    def step(lora: Tree, frozen: Tree, window: int, state: DecodeState) -> DecodeState:
        model = spec.bind(lora, frozen)
        rows = jnp.arange(state.last.shape[0])
        hidden, cache = decode_hidden(model, state, window, backend)
        token = jnp.where(state.active, greedy(model, hidden), state.last)
        n_new = state.n_new + state.active
        column = jnp.where(state.active, state.n_new, state.output.shape[1])
        return DecodeState(
            cache=cache,
            lengths=state.lengths + state.active,
            last=token,
            output=state.output.at[rows, column].set(token, mode="drop"),
            n_new=n_new,
            limit=state.limit,
            active=state.active & ~_is_end(token, eos_ids) & (n_new < state.limit),
        )

    def decode(state: DecodeState, lora: Tree, frozen: Tree, window: int) -> DecodeState:
        return jax.lax.fori_loop(0, steps, lambda _, state: step(lora, frozen, window, state), state)

    return jax.jit(decode, static_argnums=3, donate_argnums=0, compiler_options=decoder_options())


def prefill_hidden(model: Decoder, cache, tokens, lengths, slots, backend: str):
    """States `[rows, length, hidden]` of prompts, and the cache with their keys and values in these slots."""
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    segment_ids = (positions < lengths[:, None]).astype(jnp.int32)

    def attend(q, k, v, cache):
        keys, values = (
            old.at[slots, : k.shape[1]].set(new, mode="drop") for old, new in zip(cache, (k, v), strict=True)
        )
        return segment_attention(q, k, v, segment_ids, backend), (keys, values)

    return model(tokens, positions, attend, cache)


def decode_hidden(model: Decoder, state: DecodeState, window: int, backend: str):
    """States `[slots, hidden]` of the newest tokens, and the cache with their keys and values."""
    rows = jnp.arange(state.last.shape[0])
    # An idle slot writes beyond the cache, which is dropped.
    place = jnp.where(state.active, state.lengths, state.cache[0][0].shape[1])
    filled = jnp.where(state.active, state.lengths + 1, 1)

    def attend(q, k, v, cache):
        keys, values = (
            old.at[rows, place].set(new[:, 0], mode="drop") for old, new in zip(cache, (k, v), strict=True)
        )
        y = decode_attention(q[:, 0], keys[:, :window], values[:, :window], filled, backend)
        return y[:, None], (keys, values)

    hidden, cache = model(state.last[:, None], state.lengths[:, None], attend, state.cache)
    return hidden[:, 0], cache


def greedy(model: Decoder, hidden: jax.Array) -> jax.Array:
    """The most likely next token, int32 `[rows]`, of states `[rows, hidden]`; ties take the lower id."""
    return jnp.argmax(model.logits(hidden).astype(jnp.float32), axis=-1).astype(jnp.int32)


@jax.jit
def _take(array: jax.Array, slots: jax.Array) -> jax.Array:
    return constrain_decode(array[slots])


def take_slots(state: DecodeState, slots: np.ndarray) -> DecodeState:
    """These slots only. The old cache is given up layer by layer, because two of them would not fit."""
    for i, layer in enumerate(state.cache):
        state.cache[i] = tuple(_take(x, slots) for x in layer)  # type: ignore[call-overload]
    return DecodeState(state.cache, *(_take(x, slots) for x in state[1:]))


def _is_end(token: jax.Array, eos_ids: tuple[int, ...]) -> jax.Array:
    return jnp.isin(token, jnp.array(eos_ids, jnp.int32)) if eos_ids else jnp.zeros(token.shape, bool)


class _Slots:
    """The host's side of decoding: which prompt is in which slot, and the answers that are done."""

    def __init__(
        self, prompts: Sequence[Sequence[int]], limits: Sequence[int], eos_ids: tuple[int, ...], n: int
    ):
        self.prompts, self.limits, self.eos_ids = prompts, limits, eos_ids
        # The prompts that wait, shortest last: they are taken from the end.
        self.queue = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
        self.owner = np.full(n, -1)  # the prompt in each slot, until its answer is collected
        self.held = np.zeros(n, int)  # tokens in each slot's cache, an upper bound
        self.active = np.zeros(n, bool)
        self.answers: list[Generation | None] = [None] * len(prompts)

    def to_fill(self, at_once: int) -> np.ndarray:
        """The free slots to fill now, at most so many and one a prompt; none if it is better to wait.

        Waiting for a full prefill batch costs idle slots; a nearly empty one costs a prefill.
        """
        free = np.flatnonzero(~self.active)
        worthwhile = len(free) >= at_once or len(free) >= len(self.queue) or not self.active.any()
        return free[: min(at_once, len(self.queue))] if worthwhile else free[:0]

    def prefill_rows(self, taken: list[int], slots: np.ndarray, n_rows: int, sizes: Sequence[int]):
        """What `make_prefill` takes of these prompts and filler rows: tokens, lengths, slots, limits."""
        longest = max(len(self.prompts[index]) for index in taken)
        tokens = np.zeros((n_rows, min(size for size in sizes if size >= longest)), np.int32)
        lengths, limits = np.ones(n_rows, np.int32), np.ones(n_rows, np.int32)
        places = np.full(n_rows, len(self.owner), np.int32)
        for i, index in enumerate(taken):
            prompt = self.prompts[index]
            tokens[i, : len(prompt)] = prompt
            lengths[i], places[i], limits[i] = len(prompt), slots[i], self.limits[index]
        return tokens, lengths, places, limits

    def put(self, taken: list[int], slots: np.ndarray) -> None:
        """These prompts are in these slots now."""
        self.owner[slots], self.active[slots] = taken, True
        self.held[slots] = [len(self.prompts[index]) for index in taken]

    def update(self, state: DecodeState) -> int:
        """Read which slots go on, and how full they are; the number of those that ended."""
        before = self.active.sum()
        self.active, self.held = (np.array(x) for x in whole((state.active, state.lengths)))
        return int(before - self.active.sum())

    def collect(self, slots: np.ndarray, outputs: jax.Array, counts: jax.Array) -> None:
        """Keep the answers of those of these slots that have ended; row i of the outputs is of slot i."""
        ended = [(i, slot) for i, slot in enumerate(slots) if self.owner[slot] >= 0 and not self.active[slot]]
        if not ended:
            return
        tokens, lengths = whole((outputs, counts))
        for i, slot in ended:
            ids = tokens[i, : lengths[i]].tolist()
            stop_reason = "stop" if ids[-1] in self.eos_ids else "length"
            self.answers[self.owner[slot]] = Generation(ids, stop_reason)
            self.owner[slot] = -1

    def shrink(self, n: int) -> np.ndarray:
        """Go on with n slots, which hold all active rows; their numbers so far."""
        keep = np.argsort(~self.active, stable=True)[:n]
        self.owner, self.held, self.active = self.owner[keep], self.held[keep], self.active[keep]
        return keep


def generate(
    spec: ModelSpec,
    lora: Tree,
    frozen: Tree,
    prompts: Sequence[Sequence[int]],
    *,
    eos_ids: tuple[int, ...],
    max_new_tokens: int,
    slots: int,
    limits: Sequence[int] | None = None,
    tail_slots: int | None = None,
    backend: str = "xla",
    progress: Callable[[int], None] | None = None,
) -> list[Generation]:
    """Greedy answers to all prompts, in their order.

    Args:
      spec: with unrolled layers (`scan=False`), whose caches are updated in place.
      limits: most new tokens of each prompt; None: `max_new_tokens` for all.
      tail_slots: once no prompt waits and so few rows are left, go on with this many slots, because the
        longest answers end alone. None: a quarter of the slots, where that is worth another program.
      progress: called with the number of answers newly finished.
    """
    assert not spec.scan, "decoding keeps one cache a layer: use a spec with scan=False"
    slots = min(slots, len(prompts))
    if tail_slots is None:
        tail_slots = slots // 4 if slots >= TAIL_FROM_SLOTS else 0
    limits = [max_new_tokens] * len(prompts) if limits is None else limits
    lengths = [len(prompt) for prompt in prompts]
    sizes = choose_sizes(lengths, 4, PROMPT_MULTIPLE)
    capacity = max(n + m for n, m in zip(lengths, limits, strict=True))
    capacity = max(round_up(capacity, WINDOW_MULTIPLE), max(sizes))
    prefill, decode = make_prefill(spec, eos_ids, backend), make_decode(spec, eos_ids, backend)
    state = init_decode(spec, slots, capacity, max_new_tokens)
    rows, rows_a_call = _Slots(prompts, limits, eos_ids, slots), min(PREFILL_ROWS, slots)

    while rows.queue or rows.active.any():
        while len(free := rows.to_fill(rows_a_call)):
            taken = [rows.queue.pop() for _ in free]
            new = rows.prefill_rows(taken, free, rows_a_call, sizes)
            state, outputs, counts = prefill(state, lora, frozen, *new)
            rows.collect(free, outputs, counts)  # what these slots held before
            rows.put(taken, free)
        needed = int(rows.held[rows.active].max(initial=0)) + STEPS_PER_CALL
        window = min(round_up(needed, WINDOW_MULTIPLE), capacity)
        state = decode(state, lora, frozen, capacity if backend == "cudnn" else window)
        ended = rows.update(state)
        if progress is not None and ended:
            progress(ended)
        if not rows.queue and 0 < rows.active.sum() <= tail_slots < len(rows.active):
            rows.collect(np.arange(len(rows.owner)), state.output, state.n_new)
            state = take_slots(state, rows.shrink(tail_slots))
    rows.collect(np.arange(len(rows.owner)), state.output, state.n_new)
    assert all(answer is not None for answer in rows.answers)
    return rows.answers  # type: ignore[return-value]
