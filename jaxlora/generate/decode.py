"""Decoding of many prompts: batched prefill, a static KV cache, finished rows replaced at once.

    answers = generate(spec, lora, weights, prompts, stop_ids=(151645,), max_new_tokens=512, slots=256)
    answers[0].tokens, answers[0].stop_reason          # ids up to and with the token that stopped it, "stop"

The cache has a fixed number of slots; of several devices each has so many of its own and the weights whole,
or all have a part of every slot's heads. A prompt is prefilled into a free slot; all slots decode together,
several steps a call, with the choice of tokens and the stop test on the device; a finished slot takes the
next prompt. What a row generates depends on nothing but its own prompt and, where tokens are drawn, on the
seed and the prompt's number.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxlora.data.packing import choose_sizes, power_of_two, round_up
from jaxlora.generate.order import PACKED_ROWS, order_of, packed_line, packed_tokens, take_packed
from jaxlora.models.attention import decode_attention, segment_attention
from jaxlora.models.decoder import Decoder, ModelSpec, Tree
from jaxlora.runtime.ahead import Ahead, compiles_ahead
from jaxlora.runtime.devices import decode_options, decoder_options
from jaxlora.runtime.hosts import whole
from jaxlora.sharding import by_slot, constrain_decode, decode_shardings, slot_shards

STEPS_PER_CALL = 16  # tokens a slot between looks at which answers have ended
PACKED_STEPS = 8  # the same where a few prompts can be read at once without padding
PREFILL_ROWS = 32
SHARED_ROWS, SHARED_PROMPTS = 64, 4  # the same where answers share prompts: answers, and their prompts
SHARED_WORTH = 16  # free slots that are worth such a prefill, which costs about a decoding step
PROMPT_MULTIPLE = 32  # prompts are padded to a multiple of this many tokens
TAIL_FROM_SLOTS = 256  # with fewer slots a step is bound by reading the weights, however many are idle
TAILS = (2, 8)  # the slots are then halved, and go down to an eighth
WINDOW_MULTIPLE = 128  # the cache is read up to a multiple of this many tokens


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen from the logits. Temperature 0: the most likely one (greedy)."""

    temperature: float = 0.0
    top_p: float = 1.0  # drawn from the smallest set of most likely tokens with at least this probability
    logprobs: bool = False  # keep log p of every chosen token

    @property
    def draws(self) -> bool:
        return self.temperature > 0


GREEDY = Sampling()


@dataclass(frozen=True)
class Generation:
    """One answer: token ids with the one that stopped it if it came, and `stop` or `length`.

    `logprobs`, where they were asked for, are of the distribution that the tokens were drawn from: after
    temperature and top-p. Of a greedy answer they are the model's own.
    """

    tokens: list[int]
    stop_reason: str
    logprobs: list[float] | None = None


class DecodeState(NamedTuple):
    """Everything on the device between calls; one row a slot."""

    cache: list[tuple[jax.Array, jax.Array]]  # a layer: keys, values [slots, length, kv_heads, head_dim]
    lengths: jax.Array  # int32 [slots]: tokens in the cache
    last: jax.Array  # int32 [slots]: the newest token, not yet in the cache
    output: jax.Array  # int32 [slots, max_new_tokens]
    n_new: jax.Array  # int32 [slots]: tokens in `output`
    limit: jax.Array  # int32 [slots]: most tokens of this row
    active: jax.Array  # bool [slots]
    keys: jax.Array | None  # uint32 [slots, 2]: of each row's random numbers; None: nothing is drawn
    logprobs: jax.Array | None  # float32 [slots, max_new_tokens]; None: not asked for


@partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))
def init_decode(
    spec: ModelSpec, slots: int, length: int, max_new_tokens: int, sampling: Sampling = GREEDY
) -> DecodeState:
    """An empty cache for `slots` rows of at most `length` tokens, prompt and answer together."""
    assert not spec.scan, "decoding keeps one cache a layer"
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
        keys=jnp.zeros((slots, 2), jnp.uint32) if sampling.draws else None,
        logprobs=jnp.zeros((slots, max_new_tokens), jnp.float32) if sampling.logprobs else None,
    )
    return constrain_decode(state)  # made where it stays: the cache is too large for one chip


def abstract_decode(spec: ModelSpec, *settings: Any) -> DecodeState:
    """What `init_decode` of these settings gives, without any array."""
    state = jax.eval_shape(partial(init_decode, spec, *settings))
    if (mesh := jax.sharding.get_mesh()).empty or mesh.size == 1:
        return state
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, decode_shardings(mesh, state)
    )


@lru_cache(maxsize=8)  # one program for every call with the same model
def make_prefill(
    spec: ModelSpec, stop_ids: tuple[int, ...], backend: str = "xla", sampling: Sampling = GREEDY
):
    """The jitted `(state, lora, weights, tokens, lengths, slots, limits, keys, source) -> (state, old)`.

    Reads prompts `tokens` `[rows, length]` (int32, padded on the right, true `lengths` `[rows]`) into the
    given slots and picks their first token. `old` is what those slots had generated before: tokens
    `[rows, max_new_tokens]`, their numbers `[rows]`, and log-probabilities. `keys` `[rows, 2]` as in the
    state. A slot number beyond the last marks a filler row. Where devices have slots of their own, each has
    its part of the rows, and numbers its slots from 0.

    With `source`, int32 `[answers]`, several answers share a prompt, which is read once: answer i has prompt
    `source[i]`, and `slots`, `limits`, `keys` and `old` are of answers.
    """

    def prefill(
        state: DecodeState, lora: Tree, weights: Tree, tokens, lengths, slots, limits, keys=None, source=None
    ):
        rows = tokens, lengths, slots, limits, keys, source
        return by_slot(own, state, lora, weights, *rows, whole=(1, 2))

    def own(state: DecodeState, lora: Tree, weights: Tree, tokens, lengths, slots, limits, keys, source):
        model = spec.bind(lora, weights)
        hidden, cache = prefill_hidden(model, state.cache, tokens, lengths, slots, backend, source)
        final = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)[:, 0]
        if source is not None:
            final, lengths = final[source], lengths[source]
        first, logprob = choose(model, final, sampling, keys, jnp.zeros_like(lengths))
        return _begin(state._replace(cache=cache), slots, lengths, limits, first, logprob, keys, stop_ids)

    return jax.jit(prefill, donate_argnums=0, compiler_options=decoder_options())


@lru_cache(maxsize=8)
def make_packed_prefill(
    spec: ModelSpec, stop_ids: tuple[int, ...], backend: str, sampling: Sampling = GREEDY, longest: int = 0
):
    """`make_prefill` for prompts that lie end to end: `(state, lora, weights, line, lengths, slots, limits,
    keys) -> (state, old)`, with a `line` of `jaxlora.generate.order.packed_line`. One program serves all
    prompts of at most `longest` tokens; 0: of any length.
    """

    def prefill(state: DecodeState, lora: Tree, weights: Tree, line: Tree, lengths, slots, limits, keys=None):
        rows = line, lengths, slots, limits, keys
        return by_slot(own, state, lora, weights, *rows, whole=(1, 2))

    def own(state: DecodeState, lora: Tree, weights: Tree, line: Tree, lengths, slots, limits, keys):
        model, places = spec.bind(lora, weights), (line["slots"][0], line["positions"][0])

        def attend(q, k, v, cache):
            keys, values = (
                old.at[places].set(new[0], mode="drop") for old, new in zip(cache, (k, v), strict=True)
            )
            ids, n_rows = line["segment_ids"], len(slots)
            return segment_attention(q, k, v, ids, backend, n_rows, longest), (keys, values)

        hidden, cache = model(line["tokens"], line["positions"], attend, state.cache)
        final = hidden[0, line["ends"]]
        first, logprob = choose(model, final, sampling, keys, jnp.zeros_like(lengths))
        return _begin(state._replace(cache=cache), slots, lengths, limits, first, logprob, keys, stop_ids)

    return jax.jit(prefill, donate_argnums=0, compiler_options=decoder_options())


def _begin(state: DecodeState, slots, lengths, limits, first, logprob, keys, stop_ids):
    """The state with new rows in these slots, their first token chosen, and what was in the slots before."""
    old = jax.tree.map(lambda x: x.at[slots].get(mode="clip"), (state.output, state.n_new, state.logprobs))

    def put(array, value):
        return array.at[slots].set(value, mode="drop")

    state = DecodeState(
        cache=state.cache,
        lengths=put(state.lengths, lengths),
        last=put(state.last, first),
        output=state.output.at[slots, 0].set(first, mode="drop"),
        n_new=put(state.n_new, jnp.ones_like(lengths)),
        limit=put(state.limit, limits),
        active=put(state.active, ~_is_end(first, stop_ids) & (limits > 1)),
        keys=None if state.keys is None else put(state.keys, keys),
        logprobs=_at_first(state.logprobs, slots, logprob),
    )
    return state, old


@lru_cache(maxsize=8)
def make_decode(
    spec: ModelSpec,
    stop_ids: tuple[int, ...],
    backend: str = "xla",
    steps: int = STEPS_PER_CALL,
    sampling: Sampling = GREEDY,
):
    """The jitted `(state, lora, weights, window) -> state`: up to `steps` tokens for every active slot.

    `window` (static) is how much of the cache is read: at least the longest active row after the call. Steps
    without an active slot change nothing; stopping early would make the host read a condition in each.
    """

    def step(adapter: Tree, weights: Tree, window: int, state: DecodeState) -> DecodeState:
        model = spec.module(adapter, weights)
        rows = jnp.arange(state.last.shape[0])
        hidden, cache = decode_hidden(model, state, window, backend)
        chosen, logprob = choose(model, hidden, sampling, state.keys, state.n_new)
        token = jnp.where(state.active, chosen, state.last)
        n_new = state.n_new + state.active
        column = jnp.where(state.active, state.n_new, state.output.shape[1])
        return DecodeState(
            cache=cache,
            lengths=state.lengths + state.active,
            last=token,
            output=state.output.at[rows, column].set(token, mode="drop"),
            n_new=n_new,
            limit=state.limit,
            active=state.active & ~_is_end(token, stop_ids) & (n_new < state.limit),
            keys=state.keys,
            logprobs=None
            if state.logprobs is None
            else state.logprobs.at[rows, column].set(logprob, mode="drop"),
        )

    def decode(state: DecodeState, lora: Tree, weights: Tree, window: int) -> DecodeState:
        def own(state, lora, weights):
            adapter = spec.for_steps(lora)  # here, not in every step
            return jax.lax.fori_loop(0, steps, lambda _, state: step(adapter, weights, window, state), state)

        return by_slot(own, state, lora, weights, whole=(1, 2))

    options = decode_options()
    return Ahead(jax.jit(decode, static_argnums=3, donate_argnums=0, compiler_options=options), _key, (3,))


def _key(state: DecodeState, lora: Tree, weights: Tree, window: int) -> Hashable:
    """What tells programs of one model apart."""
    return jax.sharding.get_mesh(), state.cache[0][0].shape, state.output.shape, window


def prefill_hidden(model: Decoder, cache, tokens, lengths, slots, backend: str, source=None):
    """States `[rows, length, hidden]` of prompts, and the cache with their keys and values in these slots.

    With `source`, slot i gets those of prompt `source[i]`.
    """
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    segment_ids = (positions < lengths[:, None]).astype(jnp.int32)

    def attend(q, k, v, cache):
        keys, values = (
            old.at[slots, : k.shape[1]].set(new if source is None else new[source], mode="drop")
            for old, new in zip(cache, (k, v), strict=True)
        )
        return segment_attention(q, k, v, segment_ids, backend), (keys, values)

    real = None
    if model.config.experts:  # neither padding nor filler rows
        real = (segment_ids > 0) & (slots < cache[0][0].shape[0])[:, None]
    return model(tokens, positions, attend, cache, real=real)


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

    real = state.active[:, None] if model.config.experts else None
    hidden, cache = model(state.last[:, None], state.lengths[:, None], attend, state.cache, real=real)
    return hidden[:, 0], cache


def choose(model: Decoder, hidden: jax.Array, sampling: Sampling, keys, n_new) -> tuple[jax.Array, Any]:
    """The next token, int32 `[rows]`, of states `[rows, hidden]`, and its log p where that is asked for.

    Greedy: ties take the lower id. Drawn: by the Gumbel maximum, from random numbers that follow from the
    row's key and the number of tokens `n_new` `[rows]` that it has so far.
    """
    logits = model.logits(hidden).astype(jnp.float32)
    if sampling.draws:
        logits = _within_top_p(logits / sampling.temperature, sampling.top_p)
        noise = jax.vmap(lambda key, n: _gumbel(key, n, logits.shape[1:]))
        token = jnp.argmax(logits + noise(keys, n_new), axis=-1)
    else:
        token = jnp.argmax(logits, axis=-1)
    if not sampling.logprobs:
        return token.astype(jnp.int32), None
    logprobs = jnp.take_along_axis(jax.nn.log_softmax(logits), token[:, None], axis=-1)[:, 0]
    return token.astype(jnp.int32), logprobs


def _gumbel(key: jax.Array, n: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return jax.random.gumbel(jax.random.fold_in(jax.random.wrap_key_data(key), n), shape)


def _within_top_p(logits: jax.Array, top_p: float) -> jax.Array:
    """Logits `[rows, vocab]`, -inf outside the smallest set of tokens with at least this probability."""
    if top_p >= 1:
        return logits
    ordered = -jnp.sort(-logits, axis=-1)
    before = jnp.cumsum(jax.nn.softmax(ordered), axis=-1) - jax.nn.softmax(ordered)
    least = jnp.min(jnp.where(before < top_p, ordered, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(logits >= least, logits, -jnp.inf)


def _at_first(logprobs, slots, values):
    return None if logprobs is None else logprobs.at[slots, 0].set(values, mode="drop")


@jax.jit
def _take(arrays: Tree, slots: jax.Array) -> Tree:
    def own(arrays, slots):
        return jax.tree.map(lambda x: x[slots], arrays)

    return constrain_decode(by_slot(own, arrays, slots))


def take_slots(state: DecodeState, slots: np.ndarray) -> DecodeState:
    """These slots only, numbered as in `make_prefill`. The old cache is given up layer by layer, because two
    of them would not fit; everything else is small, and goes with each layer, so that it is one program."""
    rest = state[1:]
    for i, layer in enumerate(state.cache):
        state.cache[i], rest = _take((layer, state[1:]), slots)
    return DecodeState(state.cache, *rest)


def _is_end(token: jax.Array, stop_ids: tuple[int, ...]) -> jax.Array:
    return jnp.isin(token, jnp.array(stop_ids, jnp.int32)) if stop_ids else jnp.zeros(token.shape, bool)


class _Slots:
    """The host's side of decoding: which prompt is in which slot, and the answers that are done."""

    def __init__(
        self,
        prompts: Sequence[Sequence[int]],
        limits: Sequence[int],
        stop_ids: tuple[int, ...],
        n: int,
        keys: np.ndarray | None,
        queue: list[int],
        repeats: int = 1,
        shards: int = 1,
    ):
        self.prompts, self.limits, self.stop_ids, self.keys = prompts, limits, stop_ids, keys
        self.lengths = [*map(len, prompts)]
        self.repeats = repeats  # so many prompts in a row are the same one
        self.queue = queue  # the prompts that wait; they are taken from the end
        self.shards = shards  # devices with slots of their own, which are adjacent
        self.owner = np.full(n, -1)  # the prompt in each slot, until its answer is collected
        self.held = np.zeros(n, int)  # tokens in each slot's cache, an upper bound
        self.active = np.zeros(n, bool)
        self.answers: list[Generation | None] = [None] * len(prompts)
        self.most = n // shards  # slots of a device at the start

    @property
    def each(self) -> int:
        """Slots of each device."""
        return len(self.owner) // self.shards

    def _by_shard(self, slots: np.ndarray) -> list[np.ndarray]:
        return [slots[slots // self.each == shard] for shard in range(self.shards)]

    def fill(self, at_once: int) -> list[Part]:
        """Take prompts for free slots of each device, at most so many a device; none if it is better to wait.

        Waiting for a full prefill batch costs idle slots; a nearly empty one costs a prefill.
        """
        free = np.flatnonzero(~self.active)
        worth = (at_once if self.repeats == 1 else min(at_once, SHARED_WORTH)) * self.shards
        worthwhile = len(free) >= worth or len(free) >= len(self.queue) or not self.active.any()
        if not self.queue or not worthwhile:
            return []
        return [self.take(own[: min(at_once, len(self.queue))]) for own in self._by_shard(free)]

    def fill_packed(self, at_once: int, tokens: int) -> list[Part]:
        """The same for packed prefills of so many tokens."""
        free, idle = self._by_shard(np.flatnonzero(~self.active)), not self.active.any()
        taken = take_packed(self.queue, self.lengths, [*map(len, free)], at_once, tokens, idle)
        del self.queue[len(self.queue) - sum(map(len, taken)) :]
        parts = [(own, slots[: len(own)]) for own, slots in zip(taken, free, strict=True)]
        return parts if any(taken) else []

    def take(self, free: np.ndarray) -> tuple[list[int], np.ndarray]:
        """The next prompts for these slots, and the slots that they take: where answers share prompts, not
        more than `SHARED_PROMPTS` different ones."""
        taken = [self.queue.pop() for _ in free]
        if self.repeats == 1:
            return taken, free
        different = list(dict.fromkeys(index // self.repeats for index in taken))[:SHARED_PROMPTS]
        kept = [index for index in taken if index // self.repeats in different]
        self.queue += reversed(taken[len(kept) :])
        return kept, free[: len(kept)]

    def prefill_rows(self, parts: list[Part], n_rows: int, sizes: Sequence[int]) -> tuple:
        """What `make_prefill` takes of these prompts and filler rows."""
        longest = max(self.lengths[index] for taken, _ in parts for index in taken)
        size = min(size for size in sizes if size >= longest)
        rows = self._rows if self.repeats == 1 else self._shared_rows
        return _joined([rows(taken, slots, n_rows, size) for taken, slots in parts])

    def packed_rows(self, parts: list[Part], n_rows: int, n_tokens: int) -> tuple:
        """What `make_packed_prefill` takes of these prompts."""
        made = []
        for taken, slots in parts:
            prompts = [self.prompts[index] for index in taken]
            line = packed_line(prompts, slots % self.each, n_tokens, n_rows, self.each)
            lengths = _filled([self.lengths[index] for index in taken], n_rows)
            made.append((line, lengths, *self._answers(taken, slots, n_rows)))
        return _joined(made)

    def _rows(self, taken: list[int], slots: np.ndarray, n_rows: int, size: int) -> tuple:
        """Prompts in rows of so many tokens, and the slots of their answers."""
        return *_padded([self.prompts[i] for i in taken], n_rows, size), *self._answers(taken, slots, n_rows)

    def _shared_rows(self, taken: list[int], slots: np.ndarray, n_rows: int, size: int) -> tuple:
        """The same where answers share prompts, which are adjacent in the queue; and whose is which."""
        different = list(dict.fromkeys(index // self.repeats for index in taken))
        prompts = [self.prompts[group * self.repeats] for group in different]
        source = np.zeros(n_rows, np.int32)
        source[: len(taken)] = [different.index(index // self.repeats) for index in taken]
        return *_padded(prompts, SHARED_PROMPTS, size), *self._answers(taken, slots, n_rows), source

    def _answers(self, taken: list[int], slots: np.ndarray, n_rows: int) -> tuple:
        """Slots on their device, limits and keys (None where nothing is drawn) of answers and filler rows."""
        places = _filled(slots % self.each, n_rows, self.each)
        limits = _filled([self.limits[index] for index in taken], n_rows)
        if self.keys is None:
            return places, limits, None
        keys = np.zeros((n_rows, 2), np.uint32)
        keys[: len(taken)] = self.keys[taken]
        return places, limits, keys

    def put(self, parts: list[Part], n_rows: int, old: tuple) -> None:
        """These prompts are in these slots now, which held `old` before, `n_rows` of each device."""
        for shard, (taken, slots) in enumerate(parts):
            self.collect(slots, old, shard * n_rows)
            self.owner[slots], self.active[slots] = taken, True
            self.held[slots] = [self.lengths[index] for index in taken]

    def update(self, state: DecodeState) -> int:
        """Read which slots go on, and how full they are; the number of those that ended."""
        before = self.active.sum()
        self.active, self.held = (np.array(x) for x in whole((state.active, state.lengths)))
        return int(before - self.active.sum())

    def numbers(self, asked: Sequence[int] | None) -> list[int]:
        """Numbers of slots on all devices together, from the start to the last tail."""
        return [len(self.owner), *(self.shards * n for n in self.tails(asked))]

    def collect_all(self, state: DecodeState) -> None:
        """Keep the answers of all slots that have ended."""
        self.collect(np.arange(len(self.owner)), (state.output, state.n_new, state.logprobs))

    def done(self) -> list[Generation]:
        """All answers, in the order of their prompts."""
        assert all(answer is not None for answer in self.answers)
        return self.answers  # type: ignore[return-value]

    def collect(self, slots: np.ndarray, generated: tuple, first: int = 0) -> None:
        """Keep the answers of those of these slots that have ended: `generated`, from row `first` on."""
        places = enumerate(slots, first)
        ended = [(i, slot) for i, slot in places if self.owner[slot] >= 0 and not self.active[slot]]
        if not ended:
            return
        tokens, lengths, logprobs = whole(generated)
        for i, slot in ended:
            ids = tokens[i, : lengths[i]].tolist()
            stop_reason = "stop" if ids[-1] in self.stop_ids else "length"
            own = None if logprobs is None else logprobs[i, : lengths[i]].tolist()
            self.answers[self.owner[slot]] = Generation(ids, stop_reason, own)
            self.owner[slot] = -1

    @property
    def fullest(self) -> int:
        """Active rows of the device that has most."""
        return int(self.active.reshape(self.shards, -1).sum(axis=1).max())

    @property
    def longest(self) -> int:
        """Positions that the longest active row holds."""
        return int(self.held[self.active].max(initial=0))

    def tell(
        self,
        state: DecodeState,
        ended: int,
        progress: Callable[[int], None] | None,
        stream: Callable[[int, list[int]], None] | None,
    ) -> None:
        """Pass on how many answers have ended, and what every slot has generated so far."""
        if progress is not None and ended:
            progress(ended)
        if stream is None:
            return
        tokens, lengths = whole((state.output, state.n_new))
        for slot in np.flatnonzero(self.owner >= 0):
            stream(int(self.owner[slot]), tokens[slot, : lengths[slot]].tolist())

    def tail(self, sizes: Sequence[int] | None) -> int | None:
        """With how many slots a device to go on, where no prompt waits and fewer do; None: as before.

        Args:
          sizes: to choose from; None: parts of the slots, where that is worth another program.
        """
        fits = [size for size in self.tails(sizes) if 0 < self.fullest <= size < self.each]
        return min(fits) if fits and not self.queue else None

    def tails(self, sizes: Sequence[int] | None) -> Sequence[int]:
        """The numbers of slots a device that are worth a program."""
        if sizes is None:
            return [self.most // part for part in TAILS] if self.most >= TAIL_FROM_SLOTS else []
        return sizes

    def shrink(self, each: int) -> np.ndarray:
        """Go on with so many slots a device, which hold all active rows; their numbers on it so far."""
        own = np.argsort(~self.active.reshape(self.shards, -1), axis=1, stable=True)[:, :each]
        keep = (own + self.each * np.arange(self.shards)[:, None]).ravel()
        self.owner, self.held, self.active = self.owner[keep], self.held[keep], self.active[keep]
        return own.ravel()


Part = tuple[list[int], np.ndarray]  # prompts that a device reads, and their slots


def _padded(prompts: list[Sequence[int]], n_rows: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Prompts, and filler rows, padded to a size: tokens int32 `[n_rows, size]`, and lengths."""
    tokens = np.zeros((n_rows, size), np.int32)
    for i, prompt in enumerate(prompts):
        tokens[i, : len(prompt)] = prompt
    return tokens, _filled([*map(len, prompts)], n_rows)


def _filled(values: Sequence[int] | np.ndarray, n: int, filler: int = 1) -> np.ndarray:
    """Numbers, and the filler behind them: int32 `[n]`."""
    filled = np.full(n, filler, np.int32)
    filled[: len(values)] = values
    return filled


def _joined(made: list[tuple]) -> tuple:
    """The arrays of all devices in one."""
    return jax.tree.map(lambda *parts: np.concatenate(parts), *made)


def _keys(seed: int, n: int) -> np.ndarray:
    """The raw key of each prompt's random numbers, uint32 `[n, 2]`."""
    keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.key(seed), i))(jnp.arange(n))
    return np.asarray(jax.random.key_data(keys))


def _sizes(
    prompts: Sequence[Sequence[int]],
    limits: Sequence[int],
    up: Callable[[int, int], int],
    n_sizes: int = 4,
) -> tuple[tuple[int, ...], int]:
    """The lengths to which prompts are padded, and the positions of the cache."""
    sizes = choose_sizes([up(len(prompt), PROMPT_MULTIPLE) for prompt in prompts], n_sizes, PROMPT_MULTIPLE)
    longest = max(len(prompt) + limit for prompt, limit in zip(prompts, limits, strict=True))
    return sizes, max(up(longest, WINDOW_MULTIPLE), max(sizes))


def generate(
    spec: ModelSpec,
    lora: Tree,
    weights: Tree,
    prompts: Sequence[Sequence[int]],
    *,
    stop_ids: tuple[int, ...],
    max_new_tokens: int,
    slots: int,
    limits: Sequence[int] | None = None,
    tail_slots: Sequence[int] | None = None,
    backend: str = "xla",
    sampling: Sampling = GREEDY,
    seed: int = 0,
    keys: np.ndarray | None = None,
    repeats: int = 1,
    expected: Sequence[float] | None = None,
    packed: bool | None = None,
    progress: Callable[[int], None] | None = None,
    stream: Callable[[int, list[int]], None] | None = None,
) -> list[Generation]:
    """Answers to all prompts, in their order; with `repeats`, those of one prompt stand together.

    Args:
      spec, lora, weights: as of `jaxlora.generate.weights`; layers are unrolled, their caches in place.
      stop_ids: tokens that end an answer.
      seed: of the tokens that are drawn; with it a prompt's number in the list decides.
      keys: raw keys of the answers' random numbers, uint32 `[answers, 2]`, in place of the seed.
      repeats: answers to each prompt, which is then read once for all that begin together.
      limits: most new tokens of each answer; None: `max_new_tokens` for all.
      slots: answers decoded at once; of several devices with slots of their own, on each.
      expected: how long each answer may become: see `jaxlora.generate.order`.
      packed: read prompts end to end, in one program for all lengths; None: where attention allows it.
      tail_slots: go on with so few once no prompt waits and no more rows are left, because the longest
        answers end alone. None: parts of the slots, where that is worth another program.
      progress: called with the number of answers newly finished.
      stream: called every few steps with the number of a prompt and the tokens of its answer so far. Sizes
        are then powers of two, so that the longer and longer prompts of a chat share few programs.
    """
    prompts = [prompt for prompt in prompts for _ in range(repeats)] if repeats > 1 else prompts
    limits = [max_new_tokens] * len(prompts) if limits is None else limits
    up = round_up if stream is None else power_of_two
    packed = (backend == "cudnn" if packed is None else packed) and repeats == 1
    keys = None if not sampling.draws else _keys(seed, len(prompts)) if keys is None else keys
    rows, at_once = _seats(prompts, limits, stop_ids, slots, keys, repeats, expected, packed)
    sizes, capacity = _sizes(prompts, limits, up, 4 if repeats == 1 else 2)  # shared, padding costs little
    settings = (capacity, max_new_tokens, sampling)
    steps = PACKED_STEPS if packed else STEPS_PER_CALL
    decode = make_decode(spec, stop_ids, backend, steps, sampling)
    if compiles_ahead() and packed:  # the whole cache is read, so that there are few programs
        for n in rows.numbers(tail_slots):
            decode.start(abstract_decode(spec, n, *settings), lora, weights, capacity)
    fill, prefill = _filling(spec, stop_ids, backend, sampling, rows, at_once, packed, sizes, up)

    def call(state: DecodeState) -> DecodeState:
        window = min(up(rows.longest + steps, WINDOW_MULTIPLE), capacity)
        return decode(state, lora, weights, capacity if backend.startswith("cudnn") else window)

    read, state = partial(prefill, lora, weights), init_decode(spec, len(rows.owner), *settings)
    return _answer_all(rows, state, fill, read, call, tail_slots, progress, stream)


def _answer_all(
    rows: _Slots,
    state: DecodeState,
    fill: Callable[[], list[Part]],
    prefill: Callable[[list[Part], DecodeState], DecodeState],
    decode: Callable[[DecodeState], DecodeState],
    tail_slots: Sequence[int] | None,
    progress: Callable[[int], None] | None,
    stream: Callable[[int, list[int]], None] | None,
) -> list[Generation]:
    """Read prompts and decode until every one has its answer."""
    while rows.queue or rows.active.any():
        while parts := fill():
            state = prefill(parts, state)
        state = decode(state)
        rows.tell(state, rows.update(state), progress, stream)
        if (fewer := rows.tail(tail_slots)) is not None:
            rows.collect_all(state)
            state = take_slots(state, rows.shrink(fewer))
    rows.collect_all(state)
    return rows.done()


def _seats(
    prompts: Sequence[Sequence[int]],
    limits: Sequence[int],
    stop_ids: tuple[int, ...],
    slots: int,
    keys: np.ndarray | None,
    repeats: int,
    expected: Sequence[float] | None,
    packed: bool,
) -> tuple[_Slots, int]:
    """Slots for these prompts, in the order in which they begin, and how many a prefill takes on a device."""
    shards = slot_shards()
    n = min(slots * shards, round_up(len(prompts), shards))
    at_once = min(PACKED_ROWS if packed else PREFILL_ROWS if repeats == 1 else SHARED_ROWS, n // shards)
    answers = None if expected is None else np.repeat(expected, repeats).tolist()
    queue = order_of([*map(len, prompts)], answers, None if packed else at_once, n)
    return _Slots(prompts, limits, stop_ids, n, keys, queue, repeats, shards), at_once


def _filling(
    spec: ModelSpec,
    stop_ids: tuple[int, ...],
    backend: str,
    sampling: Sampling,
    rows: _Slots,
    at_once: int,
    packed: bool,
    sizes: Sequence[int],
    up: Callable[[int, int], int],
) -> tuple[Callable[[], list[Part]], Callable[..., DecodeState]]:
    """What takes prompts for free slots, and what reads them: `(lora, weights, parts, state) -> state`."""
    if packed:
        n_tokens = up(packed_tokens(rows.lengths), WINDOW_MULTIPLE)
        longest = 0
        if backend.startswith("cudnn"):  # a power of two, so that prompts of other lengths share the program
            longest = min(power_of_two(max(rows.lengths), WINDOW_MULTIPLE), n_tokens)
        program: Callable = make_packed_prefill(spec, stop_ids, backend, sampling, longest)
        fill = partial(rows.fill_packed, at_once, n_tokens)
        inputs: Callable = partial(rows.packed_rows, n_rows=at_once, n_tokens=n_tokens)
    else:
        program = make_prefill(spec, stop_ids, backend, sampling)
        fill = partial(rows.fill, at_once)
        inputs = partial(rows.prefill_rows, n_rows=at_once, sizes=sizes)

    def prefill(lora: Tree, weights: Tree, parts: list[Part], state: DecodeState) -> DecodeState:
        state, old = program(state, lora, weights, *inputs(parts))
        rows.put(parts, at_once, old)
        return state

    return fill, prefill
