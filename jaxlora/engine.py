"""The five verbs: everything you can do with a model, in memory and in one line each.

    engine = jaxlora.load("embedded:base")                 # a Hub name, a directory, gs://bucket/folder
    trainer = engine.lora(rank=8, targets="all_layer")     # or engine.full(), engine.open("adapter")
    trainer.forward_backward(rows)                         # gradients accumulate until the next step
    trainer.optim_step(learning_rate=1e-3)
    trainer.logprobs(rows), trainer.sample(["What is 2 + 3?"], max_new_tokens=64)
    trainer.save("adapter")                                # a PEFT folder; a full model: Hugging Face format

The verbs are those of Tinker, implemented by the same programs as a training run (`jaxlora.train.step`,
`jaxlora.generate`). Nothing is written to disk unless asked for, and no verb needs the main thread.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from jaxlora.checkpoints.adapters import other_base, read_adapter
from jaxlora.checkpoints.base import Base, find_base, load_base, save_model
from jaxlora.checkpoints.export import check_selected
from jaxlora.checkpoints.peft import export_adapter
from jaxlora.checkpoints.run_state import RunState
from jaxlora.config import (
    BaseDtype,
    MeshConfig,
    ModelSource,
    OptimConfig,
    RunConfig,
    TrainConfig,
    check_base_dtype,
    from_dict,
)
from jaxlora.data.packing import (
    Batch,
    cut_into_buffers,
    largest_buffer,
    pack,
    power_of_two,
    round_up,
    rows_of,
)
from jaxlora.data.render import RenderedRow, Tokenizer, chat_text, encode_texts, render_batch
from jaxlora.estimate import mesh_here
from jaxlora.generate.decode import Sampling, generate
from jaxlora.generate.weights import decode_weights
from jaxlora.lora import check_lora, check_targets, init_lora
from jaxlora.models.attention import decode_backend
from jaxlora.models.decoder import ModelSpec, Tree
from jaxlora.models.quantised import pick_scheme
from jaxlora.models.spec import check_positions
from jaxlora.runtime import hosts
from jaxlora.runtime.devices import devices_here
from jaxlora.runtime.errors import UserError
from jaxlora.runtime.records import read_manifest
from jaxlora.sharding import place_batch, place_trained, token_multiple, trained_shardings
from jaxlora.train.objective import Loss, extras_of, objective_of
from jaxlora.train.step import (
    Compute,
    Machine,
    TrainState,
    init_state,
    make_gradient_step,
    make_logprob_step,
    make_update_step,
    wire,
)

MAX_BUFFER_TOKENS = 16_384  # above this, rows are split over several buffers
DENSE_BUFFER_TOKENS = 1024  # the same for attention whose cost is quadratic in a buffer's length
MULTIPLE = 128  # buffer lengths are this (rounded up for the mesh) times a power of two: few programs
MAX_ROWS = 256  # per buffer: kernels have so many places for those of a line
_norm = jax.jit(optax.global_norm)
LEAST = 1e-30  # temperature and top_p: float32 must not take them for 0


def load(
    path: str,
    dtype: str | None = None,
    mesh: MeshConfig | Mesh | None = None,
    base_dtype: str | None = None,
) -> Engine:
    """Load a base to train or to sample from.

    Args:
      path: a Hub name, a directory, an address such as `gs://bucket/folder`, or `embedded:base`.
      dtype: `bfloat16` or `float32`, for the base and for computation; None: float32 on CPUs, else bfloat16.
      mesh: a device mesh, or its sizes; None: all devices, as a run would use them.
      base_dtype: the dtype that the base's projections are rounded to: `float8`, `int8` or `nf4`, see
        `jaxlora.models.quantised`; None: `dtype`.

    Raises:
      UserError: there is no such base, or its family is not supported.
    """
    dtype = dtype or default_dtype()
    if dtype not in ("bfloat16", "float32"):
        raise UserError(f"dtype: {dtype!r:.80} is not supported; give bfloat16 or float32")
    if base_dtype not in (None, *get_args(BaseDtype)):
        names = ", ".join(get_args(BaseDtype))
        raise UserError(f"base_dtype: {base_dtype!r:.80} is not supported; give one of {names}")
    source = ModelSource(path=str(path), dtype=dtype, base_dtype=base_dtype)  # type: ignore[arg-type]
    check_base_dtype(source)
    return engine_of(find_base(source), mesh)


def default_dtype() -> Literal["bfloat16", "float32"]:
    """The dtype that suits this machine: CPUs only emulate bfloat16."""
    return "float32" if devices_here()[0].platform == "cpu" else "bfloat16"


def engine_of(base: Base, mesh: MeshConfig | Mesh | None = None) -> Engine:
    """An engine for a base already found; `mesh` as in `load`."""
    chosen = _chosen_mesh(base, "lora") if mesh is None else mesh
    return Engine(base, wire(base.source, chosen), chosen=mesh is None)


def _chosen_mesh(base: Base, what: Literal["lora", "full"]) -> MeshConfig:
    """The mesh on which a run on this machine would train adapters, or all weights."""
    config = RunConfig(model=base.source, train=TrainConfig(what=what))
    return mesh_here(config, base.config).mesh


@dataclass(frozen=True)
class Result:
    """The result of a forward and backward pass."""

    loss: float  # the objective summed over all weighted targets, as in Tinker
    weight: float  # the sum of the targets' weights
    logprobs: list[np.ndarray]  # float32 [tokens - 1] per row: log p of each token after the first

    @property
    def mean_nll(self) -> float:
        """The loss per weighted target."""
        return self.loss / self.weight if self.weight else 0.0


@dataclass(frozen=True)
class Sample:
    """One answer. `tokens` includes the stop token, if there is one; `text` leaves it out."""

    text: str
    tokens: list[int]
    logprobs: list[float]  # under the distribution that each token was drawn from
    stop_reason: str  # `stop` or `length`


class Engine:
    """A base in memory. It is frozen, and trainers share it."""

    def __init__(self, base: Base, machine: Machine, chosen: bool = False):
        self.base, self.machine = base, machine
        self._chosen = chosen  # the mesh was chosen automatically, for training adapters
        self.dtype = base.source.dtype

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The base's tokenizer; without a chat template, texts are used as prompts unchanged."""
        return self.base.tokenizer(chat=False)

    @cached_property
    def frozen(self) -> Tree:
        """The base's weights, loaded on first use."""
        with self.inside():
            return self.base.load(self._spec(), self.machine.mesh)

    def lora(
        self, rank: int, targets: str | Sequence[str] = "all_layer", alpha: float = 32.0, seed: int = 0
    ) -> Trainer:
        """A trainer with a fresh adapter.

        Args:
          targets: a named placement (`attention_only`, `mlp_only`, `all_layer`) or module names.

        Raises:
          UserError: the model does not support this placement, or a size is impossible.
        """
        given = {"rank": rank, "targets": targets, "alpha": alpha}
        lora = from_dict({"lora": given}).lora
        spec = self._spec(lora=lora)
        check_targets(spec)
        with self.inside():
            return Trainer(self, spec, init_lora(spec, seed), seed)

    def full(self) -> Trainer:
        """A trainer of all weights: float32 master weights, and copies in the engine's dtype for computation.

        If no mesh was given to `load`, they may be placed on a different one: the mesh of a full run.
        """
        if self._chosen and (mesh := _chosen_mesh(self.base, "full")) != _chosen_mesh(self.base, "lora"):
            return Engine(self.base, wire(self.base.source, mesh)).full()
        spec = self._spec(full=True)
        with self.inside():
            weights = self.base.load(replace(spec, dtype="float32", full=False), self.machine.mesh)
        return Trainer(self, spec, weights)

    def untrained(self) -> Trainer:
        """The base unchanged, to score and sample with; nothing can be trained."""
        return Trainer(self, self._spec(), {})

    def open(self, path: str | Path) -> Trainer:
        """Open trained weights: a PEFT folder, a finished run (its selected weights), or a full model.

        Raises:
          UserError: the folder holds none of these, or they do not fit this base.
        """
        folder = Path(path)
        seed = None
        if (folder / "manifest.json").is_file():
            manifest = read_manifest(folder)
            recorded = (manifest.get("base") or {}).get("fingerprint")
            if recorded not in (None, self.base.fingerprint()):
                trained_on = (manifest.get("base") or {}).get("path")
                raise UserError(f"{folder}: was trained on a different base; load({trained_on!r}) first")
            check_selected(folder)
            seed, folder = (manifest.get("config") or {}).get("seed"), folder / "selected"
        if not (folder / "config.json").is_file():
            adapter = read_adapter(folder, self.base.config, self.base.folder)
            if reason := other_base(adapter.metadata, self.base):
                raise UserError(f"{folder}: {reason}; load that base first")
            spec = self._spec(lora=adapter.lora, shapes=adapter.shapes)
            return Trainer(self, spec, adapter.tree, seed if seed is not None else adapter.metadata["seed"])
        spec = self._spec(full=True)
        with self.inside():
            weights = load_base(folder, replace(spec, dtype="float32", full=False), self.machine.mesh)
        return Trainer(self, spec, weights, seed)

    def _spec(self, **trained: Any) -> ModelSpec:
        scheme = pick_scheme(self.base.source, self.machine.mesh.devices.flat[0], training=True)
        if scheme is not None and trained.get("full"):
            raise UserError(
                f"a base in {scheme.kind} cannot be fully fine-tuned; load it without base_dtype, or train an"
                " adapter"
            )
        return ModelSpec(self.base.config, dtype=self.dtype, scan=self.machine.scan, scheme=scheme, **trained)

    @contextmanager
    def inside(self) -> Iterator[None]:
        """Activate the mesh and full-precision float32 products (GPUs and TPUs would round their inputs)."""
        with jax.set_mesh(self.machine.mesh), self.precise():
            yield

    def precise(self) -> AbstractContextManager[None]:
        """Compute float32 products in full precision."""
        return jax.default_matmul_precision("highest" if self.dtype == "float32" else None)


Row = Mapping[str, Any] | RenderedRow


class Trainer:
    """Trainable weights on an engine's base: an adapter, or all weights."""

    def __init__(self, engine: Engine, spec: ModelSpec, trained: Tree, seed: int | None = None):
        self.engine, self.spec, self.seed = engine, spec, seed
        with engine.inside():
            self._trained = place_trained(engine.machine.mesh, spec, trained)
        if spec.lora is not None:
            check_lora(spec, self._trained)
        self._optim: OptimConfig | None = None
        self._opt_state: Any = None
        self._grads: Tree | None = None
        self._decodes: tuple[ModelSpec, Tree, Tree, Mesh] | None = None

    # --- Training -------------------------------------------------------------------------------------------

    def forward_backward(self, rows: Sequence[Row], loss: str | Loss = "cross_entropy") -> Result:
        """Compute loss and gradient of these rows; gradients accumulate until the next `optim_step`.

        Args:
          rows: dictionaries with `messages`, or with `tokens` and `weights` (one per token, for the loss of
            predicting it; the first token has no loss): see `jaxlora.data.render`. Policy-gradient objectives
            also need `advantages` and the sampler's `logprobs`, one per token like the weights.
          loss: an objective from `jaxlora.train.objective`, by name or with settings.

        Raises:
          UserError: a row cannot be used (the message names its number), or the loss is unknown.

        If interrupted (by Ctrl-C, or out of memory), the gradients since the last step are dropped.
        """
        if not isinstance(loss, str | Loss):
            raise UserError(f"loss: {loss!r:.80} is not known; give a name or a jaxlora.train.objective.Loss")
        objective_of(loss)
        rendered = [_with_extras(i, row, extras_of(loss)) for i, row in enumerate(self._render(rows))]
        # The step donates the buffers of the accumulated gradients: if it is interrupted, they are lost.
        grads, self._grads = self._grads, None
        try:
            with self.engine.inside():
                grads = self._zeros() if grads is None else grads
                made = []
                for batch, compute, by_row in self._batches(rendered):
                    step = make_gradient_step(self.spec, compute, loss)
                    placed = place_batch(self.engine.machine.mesh, batch)
                    grads, value, found = step(self._trained, grads, self._frozen, placed)
                    made.append((value, found, by_row, float(batch["weights"].sum())))
                total = sum(float(hosts.whole(value)) for value, *_ in made)
                logprobs = [row for _, found, by_row, _ in made for row in by_row(found)]
        except BaseException as error:
            error.add_note("The gradients since the last optim_step are dropped; compute them again.")
            raise
        self._grads = grads
        return Result(total, sum(weight for *_, weight in made), logprobs)

    def optim_step(
        self,
        learning_rate: float,
        *,
        b1: float = 0.9,
        b2: float = 0.95,
        eps: float = 1e-12,
        weight_decay: float = 0.0,
        clip_norm: float | None = None,
    ) -> dict[str, float]:
        """Take one Adam step (AdamW with `weight_decay`) on the accumulated gradients, then clear them.

        Returns:
          `grad_norm` and `update_norm`, global norms.

        Raises:
          UserError: no gradient was computed, it is not finite (then nothing changes, and the message names
            the step), or settings other than the learning rate changed since the last step.
        """
        if self._grads is None:
            raise UserError("optim_step: there is no gradient; call forward_backward first")
        given = {"b1": b1, "b2": b2, "eps": eps, "weight_decay": weight_decay, "clip_norm": clip_norm}
        optim = from_dict({"optim": given | {"peak_lr": learning_rate}}).optim
        same = replace(optim, peak_lr=1.0)
        if self._optim not in (None, same):
            raise UserError("optim_step: only the learning rate may change between steps")
        with self.engine.inside():
            if not np.isfinite(norm := float(hosts.whole(_norm(self._grads)))):
                done = 0 if self._opt_state is None else int(hosts.whole(self._opt_state[0].count))
                self._grads = None
                raise UserError(
                    f"optim_step {done + 1}: the gradient's norm is {norm:g}, so it was dropped and"
                    " nothing changed; look at the loss, and at the rows' logprobs and advantages"
                )
            self._optim, self._decodes = same, None
            step = make_update_step(self.spec, optim)
            state, norms = step(self.state, self._grads, jnp.float32(learning_rate))
            self._grads, self._trained, self._opt_state = None, state.trained, state.opt_state
            return {name: float(hosts.whole(value)) for name, value in norms.items()}

    @property
    def trained(self) -> Tree:
        """The trained arrays, float32. A step donates their buffers: copy what you need to keep."""
        return self._trained

    @property
    def state(self) -> TrainState:
        """The trained weights with their optimizer state, as stored in a run's checkpoints."""
        if self._opt_state is None:
            with self.engine.inside():
                start = init_state(self._trained, self._optim or OptimConfig())
                shardings = trained_shardings(self.engine.machine.mesh, self.spec, start.opt_state)
                self._opt_state = jax.tree.map(jax.device_put, start.opt_state, shardings)
        return TrainState(self._trained, self._opt_state)

    # --- Looking --------------------------------------------------------------------------------------------

    def logprobs(self, rows: Sequence[Row]) -> list[np.ndarray]:
        """log p of each token after the first, float32 `[tokens - 1]` per row; see `forward_backward`."""
        found = []
        with self.engine.inside():
            rendered = [_with_extras(i, row, ()) for i, row in enumerate(self._render(rows))]
            for batch, compute, by_row in self._batches(rendered):
                step = make_logprob_step(self.spec, compute)
                values = step(self._trained, self._frozen, place_batch(self.engine.machine.mesh, batch))
                found += by_row(values)
        return found

    def sample(
        self,
        prompts: Sequence[str | Sequence[Mapping[str, Any]] | Sequence[int]],
        max_new_tokens: int = 256,
        temperature: float = 1.0,
        top_p: float = 1.0,
        seed: int = 0,
        stop_ids: Sequence[int] | None = None,
        slots: int = 64,
        stream: Callable[[int, str], None] | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> list[Sample]:
        """Sample one answer to each prompt, in order.

        Args:
          prompts: texts (each one user turn), lists of messages, or token ids.
          temperature: 0: greedy decoding; ties take the lower id.
          top_p: draw from the smallest set of most likely tokens with at least this total probability.
          seed: determines the tokens drawn, together with the prompt and its number.
          stop_ids: tokens that end an answer; None: the end-of-turn tokens of the model and its template.
          slots: answers decoded at once.
          stream: called every few tokens with the number of a prompt and the text of its answer so far.
          progress: called with the number of newly finished answers.

        Raises:
          UserError: a prompt cannot be rendered, or a setting is impossible.
        """
        _check_settings(temperature, top_p, max_new_tokens=max_new_tokens, slots=slots, seed=seed)
        if not (prompts := _listed(prompts, "prompts")):
            return []
        ids = [self._prompt(i, prompt) for i, prompt in enumerate(prompts)]
        longest = max(map(len, ids)) + max_new_tokens
        check_positions(
            self.spec.config, longest, "sample: max_new_tokens: the longest prompt and its answer"
        )
        stops = self._ids(stop_ids, "stop_ids") if stop_ids is not None else self._stop_ids
        spec, lora, weights, mesh = self._decoding(keep=stream is not None)

        def show(i: int, tokens: list[int]) -> None:
            assert stream is not None
            text = self._text(tokens[:-1] if tokens[-1] in stops else tokens)
            stream(i, text.rstrip("\ufffd"))  # the first bytes of an incomplete character

        with jax.set_mesh(mesh), self.engine.precise():
            answers = generate(
                spec,
                lora,
                weights,
                ids,
                stop_ids=tuple(stops),
                max_new_tokens=max_new_tokens,
                slots=slots,
                backend=decode_backend(spec.dtype),
                sampling=Sampling(temperature, top_p, logprobs=True),
                seed=seed,
                progress=progress,
                stream=show if stream is not None else None,
            )
        return [self._sample(answer) for answer in answers]

    # --- Keeping --------------------------------------------------------------------------------------------

    def save(self, path: str | Path, overwrite: bool = False) -> None:
        """Write the adapter as a PEFT folder, or the full model as a Hugging Face directory.

        Raises:
          UserError: the folder exists (and `overwrite` is false), or a value is not finite.
        """
        name = self.engine.base.source.path
        if self.spec.lora is not None:
            export_adapter(
                path,
                self.spec,
                self._trained,
                name,
                seed=self.seed,
                tokenizer=self.engine.base.tokenizer_folder(),
                base_fingerprint=self.engine.base.fingerprint(),
                overwrite=overwrite,
            )
            return
        if self.engine.base.folder is None:
            raise UserError("save: the base is only a shape, with no config.json to write beside the weights")
        _, weights = self.spec.computing(self._trained, {})
        save_model(path, self.spec, weights, self.engine.base.folder)

    def save_state(self, path: str | Path, step: int = 0) -> None:
        """Write the trained weights and their optimizer state, for `resume`."""
        with self.engine.inside(), RunState(Path(path), {}) as store:
            store.save(step, self.state, {"step": step})

    def resume(self, path: str | Path) -> int:
        """Restore the newest state in a folder of `save_state` or a run directory; returns its step.

        Raises:
          UserError: there is no state, or it is damaged.
        """
        folder = Path(path)
        folder = folder / "checkpoints" if (folder / "manifest.json").is_file() else folder
        if not folder.is_dir():
            raise UserError(f"{folder}: no such folder; give one written by save_state, or a run")
        shardings = trained_shardings(self.engine.machine.mesh, self.spec, self.state)
        like = jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), self.state, shardings
        )
        with self.engine.inside(), RunState(folder, None) as store:
            found = store.restore(like)
        if found is None:
            raise UserError(f"{folder}: holds no checkpoint")
        self._decodes = None
        self._trained, self._opt_state, self._grads = found.state.trained, found.state.opt_state, None
        return found.step

    # --- Inside ---------------------------------------------------------------------------------------------

    @property
    def _frozen(self) -> Tree:
        return {} if self.spec.full else self.engine.frozen

    def _zeros(self) -> Tree:
        return jax.tree.map(jnp.zeros_like, self._trained)

    def _render(self, rows: Sequence[Row]) -> list[RenderedRow]:
        """The rows as tokens and weights."""
        rows = _listed(rows, "rows")
        if not rows:
            raise UserError("rows: give a list of at least one row")
        chats = [i for i, row in enumerate(rows) if not isinstance(row, RenderedRow) and _is_chat(row)]
        done: dict[int, RenderedRow | UserError] = {}
        if chats:
            pairs = [(str(i), rows[i]["messages"]) for i in chats]  # type: ignore[index]
            done = dict(zip(chats, render_batch(self.engine.tokenizer, pairs), strict=True))
        found = []
        for i in chats:
            if odd := sorted(rows[i].keys() & {"tokens", "weights"}):
                raise UserError(f"row {i}: both `{odd[0]}` and `messages` are given; give one of them")
        for i, row in enumerate(rows):
            one = row if isinstance(row, RenderedRow) else done[i] if i in done else _from_ids(i, row)
            if isinstance(one, UserError):
                raise UserError(f"row {i}: {one}")
            known = self.spec.config.vocab_size
            if len(outside := one.tokens[(one.tokens < 0) | (one.tokens >= known)]):
                raise UserError(f"row {i}: token {outside[0]} is not one of the model's {known}")
            if one.n_tokens > self.spec.config.max_position_embeddings:
                most = self.spec.config.max_position_embeddings
                raise UserError(f"row {i}: {one.n_tokens} tokens, but the model has only {most} positions")
            found.append(one)
        return found

    def _batches(self, rows: list[RenderedRow]) -> Iterator[tuple[Batch, Compute, Callable]]:
        """Yield packed batches `[1, lines, length]` of all rows in order, how to compute them, and a function
        that splits their results by row.

        Each batch is one buffer: every other number of buffers would be a program that takes minutes to
        compile.
        """
        dense = self.engine.machine.backend == "xla"
        most = DENSE_BUFFER_TOKENS if dense else MAX_BUFFER_TOKENS
        lengths = [row.n_tokens for row in rows]
        lines = self.engine.machine.lines
        parts = [
            part[i : i + MAX_ROWS]
            for part in cut_into_buffers(lengths, most * lines)
            for i in range(0, len(part), MAX_ROWS)
        ]
        own = [[lengths[i] for i in part] for part in parts]
        whole = max(map(sum, own))  # makes each part exactly one buffer
        longest = max(largest_buffer(part, whole, lines) for part in own)
        length = power_of_two(longest, round_up(MULTIPLE, token_multiple(self.engine.machine.mesh)))
        rows_a_line = round_up(max(map(len, parts)), 32)
        longest_row = min(power_of_two(max(lengths), MULTIPLE), length)
        compute = self.engine.machine.compute(rows_a_line, longest_row)
        for part, sizes in zip(parts, own, strict=True):
            batch = pack([rows[i] for i in part], (length,), whole, lines)
            yield batch, compute, partial(_by_row, lengths=sizes, whole=whole, lines=lines)

    def _prompt(self, i: int, prompt: Any) -> list[int]:
        if isinstance(prompt, str) and not self.engine.tokenizer.chat_template:
            return encode_texts(self.engine.tokenizer, [prompt])[0]
        if isinstance(prompt, str):
            prompt = [{"role": "user", "content": prompt}]
        prompt = _listed(prompt, f"prompt {i}")
        if prompt and all(isinstance(turn, Mapping) for turn in prompt):
            text = chat_text(self.engine.tokenizer, prompt, generation_prompt=True)
            return encode_texts(self.engine.tokenizer, [text])[0]
        if not (ids := self._ids(prompt, f"prompt {i}")):
            raise UserError(f"prompt {i}: give at least one token")
        return ids

    @property
    def _stop_ids(self) -> Sequence[int]:
        return self.engine.base.stop_ids(self.engine.tokenizer)

    def _text(self, ids: Sequence[int]) -> str:
        return str(self.engine.tokenizer.decode(list(ids)))

    def _decoding(self, keep: bool) -> tuple[ModelSpec, Tree, Tree, Mesh]:
        """Model, adapter, weights and mesh for decoding. With `keep` they are cached until the next step: a
        chat needs them often, and preparing them may copy the base."""
        if self._decodes is not None:
            return self._decodes
        with self.engine.inside():
            made = decode_weights(self.spec, self._trained, self._frozen, merge=False)
        self._decodes = made if keep else None
        return made

    def _ids(self, values: Any, name: str) -> list[int]:
        """The values as valid token ids of the model."""
        listed, known = _listed(values, name), self.spec.config.vocab_size
        ids = _array(listed or np.zeros(0, int))
        if ids.ndim != 1 or ids.dtype.kind not in "iu" or not ((ids >= 0) & (ids < known)).all():
            raise UserError(f"{name}: give whole numbers, each from 0 to {known - 1}")
        return ids.tolist()

    def _sample(self, answer) -> Sample:
        ids = answer.tokens[:-1] if answer.stop_reason == "stop" else answer.tokens
        return Sample(self._text(ids), answer.tokens, answer.logprobs, answer.stop_reason)


def _check_settings(temperature: Any, top_p: Any, **whole: Any) -> None:
    """Refuse impossible settings of `sample`."""
    for name, value in whole.items():
        least = -(2**63) if name == "seed" else 1
        if not isinstance(value, int | np.integer) or not least <= value < 2**63:
            raise UserError(
                f"sample: {name}: {value!r:.80} is not allowed; give a whole number, {least} or more"
            )
    for name, value, most, allowed in (
        ("temperature", temperature, np.finfo(np.float32).max, "0, or more"),
        ("top_p", top_p, 1, "more than 0, at most 1"),
    ):
        greedy = name == "temperature" and isinstance(value, int | float) and value == 0
        if not greedy and not (isinstance(value, int | float | np.number) and LEAST <= value <= most):
            raise UserError(f"sample: {name}: {value!r:.80} is not allowed; give {allowed}")


def _is_chat(row: Any) -> bool:
    return isinstance(row, Mapping) and "messages" in row


def _from_ids(i: int, row: Any) -> RenderedRow:
    """A row from token ids, with one weight per token."""
    if not isinstance(row, Mapping) or "tokens" not in row:
        raise UserError(f"row {i}: give `messages`, or `tokens` and `weights`")
    if odd := sorted(map(str, row.keys() - {"tokens", "weights", "row_id", *_EXTRAS})):
        raise UserError(f"row {i}: {odd[0]!r:.80} is not known; give `tokens` and `weights`")
    tokens = _array(row["tokens"])
    if tokens.ndim != 1 or len(tokens) < 2 or not np.issubdtype(tokens.dtype, np.integer):
        raise UserError(f"row {i}: tokens must be at least two whole numbers")
    weights = _numbers(i, "weights", row.get("weights", np.arange(len(tokens)) > 0), len(tokens))
    extras = {own: _numbers(i, name, row[name], len(tokens)) for name, own in _EXTRAS.items() if name in row}
    within = np.clip(
        tokens.astype(np.int64), -1, np.iinfo(np.int32).max
    )  # out-of-range ids must not wrap around to a valid one
    return RenderedRow(str(row.get("row_id", i)), within.astype(np.int32), weights, extras=extras)


# Per-token values of a row besides its weights, and the objectives' names for them.
_EXTRAS = {
    "advantages": "advantages",
    "logprobs": "sampler_logprobs",
    "reference_logprobs": "reference_logprobs",
}


def _numbers(i: int, name: str, values: Any, n_tokens: int) -> np.ndarray:
    """One finite float32 per token."""
    numbers = _array(values)
    if numbers.dtype.kind in "biuf":
        with np.errstate(over="ignore"):  # values beyond float32 become infinite, and are refused
            numbers = numbers.astype(np.float32)
    if numbers.shape != (n_tokens,) or numbers.dtype != np.float32 or not np.isfinite(numbers).all():
        raise UserError(f"row {i}: {n_tokens} tokens need as many finite {name}, not {numbers.shape}")
    return numbers


def _with_extras(i: int, row: RenderedRow, needed: Sequence[str]) -> RenderedRow:
    """The row with only the extras that an objective uses."""
    if missing := [name for name in needed if name not in row.extras]:
        given = next(name for name, own in _EXTRAS.items() if own == missing[0])
        raise UserError(f"row {i}: this loss needs `{given}`, one number per token")
    return replace(row, extras={name: row.extras[name] for name in needed})


def _array(values: Any) -> np.ndarray:
    """The values as an array; if they do not form one, a scalar array."""
    try:
        return np.asarray(values)
    except (ValueError, TypeError, OverflowError):
        return np.asarray(None)


def _listed(values: Any, name: str) -> list[Any]:
    """The members of a list, an array, a generator, ...

    Raises:
      UserError: it is not iterable, or a single text or dictionary, which would be split into its parts.
    """
    if isinstance(values, str | bytes | Mapping) or not hasattr(values, "__iter__"):
        raise UserError(f"{name}: give a list, not one {type(values).__name__}")
    return list(values)


def _by_row(values: Any, lengths: list[int], whole: int, lines: int) -> list[np.ndarray]:
    """Values `[1, lines, length]` as one array per row."""
    return rows_of(hosts.whole(values), lengths, whole, lines)
