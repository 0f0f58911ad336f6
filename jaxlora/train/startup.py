"""A check before step 1: the fresh adapter has no effect, and decoder and trainer compute the same.

    check_start(job, state.trained, frozen)       # UserError, one line, if anything differs

It runs on the first two layers of the model, so its cost does not depend on depth: a wrong scale, merge, mask
or position is wrong in every layer. The start of two training rows goes through

- the trainer: packed into one buffer, as a validation batch with the run's attention backend;
- the decoder: one prompt per slot, partly prefilled, then decoded token by token from the KV cache, with the
  adapter merged into the weights or not, as in the evaluation,

once with the adapter as it is and once with random B. Log-probabilities of the same tokens must agree; with
the fresh adapter they must equal those without an adapter bit for bit.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from jaxlora.data.packing import pack, round_up, rows_of
from jaxlora.data.render import RenderedRow
from jaxlora.generate.decode import (
    PROMPT_MULTIPLE,
    WINDOW_MULTIPLE,
    decode_hidden,
    init_decode,
    prefill_hidden,
)
from jaxlora.generate.weights import decode_weights
from jaxlora.models.attention import decode_backend
from jaxlora.models.decoder import ModelSpec, Tree
from jaxlora.runtime import hosts
from jaxlora.runtime.errors import UserError
from jaxlora.sharding import place_batch, place_trained, token_multiple
from jaxlora.train.job import Job
from jaxlora.train.step import make_logprob_step

LAYERS = 2
PROMPT, LENGTH = 11, 16  # tokens of each row that are prefilled, and in all
# Largest difference of a log-probability, in nats; with random B, plus this share of its effect.
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.2}
SHARE = {"float32": 0.01, "bfloat16": 0.1}


@dataclass(frozen=True)
class StartCheck:
    """Largest differences found, in nats."""

    fresh: float  # trainer and decoder, as training starts
    perturbed: float | None  # trainer and decoder, with random B; None without an adapter
    effect: float | None  # the trainer with and without random B


def check_start(job: Job, trained: Tree, frozen: Tree) -> StartCheck:
    """Check the trained weights before their first step; see above.

    Raises:
      UserError: names what differs, and by how much.
    """
    spec, trained, frozen = first_layers(job.spec, trained, frozen)
    rows = [
        RenderedRow(row.row_id, np.resize(row.tokens, LENGTH + 1), np.ones(LENGTH + 1, np.float32))
        for row in (job.train_rows[0], job.train_rows[-1])
    ]
    trainer = partial(_by_trainer, job, spec, frozen, rows)
    decoder = partial(_by_decoder, spec, frozen, rows, job.config.eval.merge_adapter)
    limit = TOLERANCE[spec.dtype]
    before = trainer(trained)
    fresh = _gap(before, decoder(trained))
    if spec.lora is None:
        _require("the weights as they are", fresh, limit)
        return StartCheck(fresh, None, None)

    start = hosts.whole(trained)
    if job.config.lora.start is None:
        base = trainer(place_trained(job.mesh, spec, jax.tree.map(np.zeros_like, start)))
        if not np.array_equal(before, base):
            raise UserError(
                "start-up check: the fresh adapter changes log-probabilities by up to"
                f" {_gap(before, base):.2g} but should not change any; its B must be zero"
            )
    perturbed = place_trained(job.mesh, spec, with_random_b(spec, start))
    after = trainer(perturbed)
    found = StartCheck(fresh, _gap(after, decoder(perturbed)), _gap(after, before))
    if found.effect == 0:
        raise UserError("start-up check: an adapter with random B has no effect; it is not connected")
    assert found.perturbed is not None
    assert found.effect is not None
    _require("the fresh adapter", found.fresh, limit)
    _require("a random B", found.perturbed, limit + SHARE[spec.dtype] * found.effect)
    return found


def _require(what: str, gap: float, limit: float) -> None:
    if not gap <= limit:
        raise UserError(
            f"start-up check: with {what}, trainer and decoder differ by {gap:.2g} in a log-probability (at"
            f" most {limit:.2g}): the model evaluated would not be the one trained."
            " --config.train.startup_check=false trains anyway"
        )


def first_layers(spec: ModelSpec, trained: Tree, frozen: Tree) -> tuple[ModelSpec, Tree, Tree]:
    """The model truncated to its first `LAYERS` layers, with the whole embedding and head."""
    depth = min(LAYERS, spec.config.num_hidden_layers)

    def cut(tree: Tree, stacked: bool) -> Tree:
        if "layers" not in tree:
            return tree
        layers = tree["layers"]
        return {**tree, "layers": _cut(layers, depth) if stacked else {i: layers[i] for i in range(depth)}}

    shapes = tuple(replace(s, ranks=s.ranks[:depth], scales=s.scales[:depth]) for s in spec.shapes)
    short = replace(spec, config=replace(spec.config, num_hidden_layers=depth), shapes=shapes)
    return short, cut(trained, spec.scan or not spec.full), cut(frozen, spec.scan)


@partial(jax.jit, static_argnums=1)
def _cut(layers: Tree, depth: int) -> Tree:
    return jax.tree.map(lambda x: x[:depth], layers)


def with_random_b(spec: ModelSpec, lora: Tree) -> Tree:
    """The adapter with random B, large enough to change each adapted product by about its own size."""
    assert spec.lora is not None
    size = 2 * spec.lora.rank**0.5 / spec.lora.alpha

    random = np.random.default_rng(0)

    def draw(path, x):
        if path[-1].key != "lora_b":
            return x
        return x + size * random.uniform(-1, 1, x.shape).astype(x.dtype)

    return jax.tree.map_with_path(draw, lora)


def _by_trainer(
    job: Job, spec: ModelSpec, frozen: Tree, rows: list[RenderedRow], trained: Tree
) -> np.ndarray:
    """Log-probabilities of each row's last tokens `[rows, LENGTH - PROMPT + 1]`, as computed by a step."""
    n_tokens = sum(row.n_tokens for row in rows)
    lines = job.machine.lines
    batch = pack(rows, (round_up(n_tokens, token_multiple(job.mesh)),), n_tokens, lines)
    step = make_logprob_step(spec, job.machine.compute(len(rows)))
    values = np.asarray(step(trained, frozen, place_batch(job.mesh, batch)), np.float64)
    return np.stack([own[PROMPT - 1 :] for own in rows_of(values, [LENGTH] * len(rows), n_tokens, lines)])


def _by_decoder(
    spec: ModelSpec, frozen: Tree, rows: list[RenderedRow], merge: bool, trained: Tree
) -> np.ndarray:
    """The same log-probabilities by prefill and decoding steps from the KV cache."""
    tokens = np.stack([row.tokens for row in rows])
    spec, lora, weights, mesh = decode_weights(spec, trained, frozen, merge=merge)
    with jax.set_mesh(mesh):
        return np.asarray(hosts.whole(_decode(spec, lora, weights, tokens)), np.float64)


@partial(jax.jit, static_argnums=0)
def _decode(spec: ModelSpec, lora: Tree, frozen: Tree, tokens) -> jax.Array:
    """log p of tokens after the prompt, `[rows, LENGTH - PROMPT + 1]`, given tokens `[rows, LENGTH + 1]`."""
    model, backend = spec.bind(lora, frozen), decode_backend(spec.dtype)
    slots = jnp.arange(len(tokens))
    lengths = jnp.full(len(tokens), PROMPT, jnp.int32)
    prompts = jnp.pad(tokens[:, :PROMPT], ((0, 0), (0, -PROMPT % PROMPT_MULTIPLE)))

    def pick(hidden, token):
        logits = model.logits(hidden).astype(jnp.float32)
        return jnp.take_along_axis(jax.nn.log_softmax(logits), token[:, None], axis=1)[:, 0]

    state = init_decode(spec, len(tokens), WINDOW_MULTIPLE, 1)
    hidden, cache = prefill_hidden(model, state.cache, prompts, lengths, slots, backend)
    first = pick(hidden[:, PROMPT - 1], tokens[:, PROMPT])
    state = state._replace(cache=cache, lengths=lengths, active=jnp.ones(len(tokens), bool))

    def step(state, pair):
        token, following = pair
        hidden, cache = decode_hidden(model, state._replace(last=token), WINDOW_MULTIPLE, backend)
        return state._replace(cache=cache, lengths=state.lengths + 1), pick(hidden, following)

    forced = tokens[:, PROMPT:-1].T, tokens[:, PROMPT + 1 :].T
    return jnp.concatenate([first[None], jax.lax.scan(step, state, forced)[1]]).T


def _gap(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.max(np.abs(a - b)))
