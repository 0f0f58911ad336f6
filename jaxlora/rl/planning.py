"""Plan learning from rewards for a slice without having it: memory, time per phase of a batch, dollars.

    plan = plan_rewards(config, published_config("qwen3-8b"), slice_named("v5e-8"), Expected())
    plan.fits, plan.seconds, plan.run.hours, print_rewards(plan, console)

Sampler and learner are compiled for the slice; how often each program runs follows from the lengths of a
batch, see `jaxlora.rl.workload`. Scoring runs on the host, so it is timed on the machine that makes the plan.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
from rich.console import Console

from jaxlora.config import RLConfig, RunConfig
from jaxlora.data.packing import round_up
from jaxlora.estimate import BACKWARD_PASSES, FULL
from jaxlora.generate.decode import (
    PROMPT_MULTIPLE,
    SHARED_PROMPTS,
    SHARED_ROWS,
    DecodeState,
    abstract_decode,
    make_decode,
    make_prefill,
)
from jaxlora.models.attention import pick_decode_backend
from jaxlora.models.shared import Places
from jaxlora.models.spec import ModelConfig
from jaxlora.plan.programs import Program, Programs, Workload
from jaxlora.plan.report import GIB, RunCost, all_fit, cost_of, programs_table
from jaxlora.rl.job import check_settings, loss_of
from jaxlora.rl.mesh import (
    cache_length,
    choices,
    mesh_on_slice,
    moved,
    sampling_form,
    sampling_of,
    shares_prompts,
    slots_of,
)
from jaxlora.rl.problems import Problem
from jaxlora.rl.rewards import grader_named
from jaxlora.rl.workload import USUAL_SHARE, Lengths, drawn_lengths, learning_buffers, sampling_calls
from jaxlora.runtime.devices import SLICES, Slice
from jaxlora.runtime.errors import UserError
from jaxlora.runtime.progress import progress_bar
from jaxlora.sharding import (
    abstract,
    base_shardings,
    device_bytes,
    replicated,
    slot_shards,
    token_multiple,
    trained_shardings,
)
from jaxlora.train.objective import extras_of
from jaxlora.train.step import make_gradient_step, make_logprob_step, make_update_step

STANDARD = 10_000, 32  # problems, and answers to each, of the standard run that every plan includes
GRADED = 64  # answers whose grading is timed


@dataclass(frozen=True)
class Expected:
    """Mean tokens of a run's prompts and answers; None for answers means a third of the longest."""

    prompt_tokens: float = 120
    answer_tokens: float | None = None

    def lengths(self, rl: RLConfig, group: int) -> Lengths:
        """The lengths in a batch with `group` answers to each prompt."""
        mean = self.answer_tokens or USUAL_SHARE * rl.max_new_tokens
        return drawn_lengths(rl.prompts, group, self.prompt_tokens, mean, rl.max_new_tokens)


@dataclass(frozen=True)
class RewardsPlan:
    """A configuration on a slice. Seconds are at the likely rates of `jaxlora.estimate.Roofline`."""

    slice: Slice
    mesh: dict[str, int]
    shared: bool  # whether sampler and learner read the same base
    programs: list[Program]
    fits: bool
    answer_tokens: float  # mean
    seconds: dict[str, float | None] | None  # of a batch, by phase; None: unknown, or it does not fit
    tokens_per_second: float | None  # sampled, end to end
    run: RunCost | None  # of the configuration
    standard: RunCost | None  # of `STANDARD`
    advice: str | None

    def to_json(self) -> dict[str, Any]:
        """Plain values, as in `jaxlora.plan.report.Plan`."""
        values = asdict(self)
        values["slice"] = self.slice.to_json()
        values["capacity_bytes"] = self.slice.chip.hbm_bytes
        values["programs"] = [program.to_json() for program in self.programs]
        return values


# --- Programs -----------------------------------------------------------------------------------------------


class RewardPrograms:
    """The programs of sampler and learner for a configuration on a slice, and what else each chip holds."""

    def __init__(self, config: RunConfig, model: ModelConfig, slice_: Slice, lengths: Lengths):
        rl = config.rl
        self.longest = int(lengths.prompts.max()) + rl.max_new_tokens
        self.prompt = round_up(int(lengths.prompts.max()), PROMPT_MULTIPLE)
        config = mesh_on_slice(config, model, slice_, self.longest)
        config = replace(config, model=replace(config.model, layers="unroll"))  # layers are shared one by one
        self.of = Programs(config, model, slice_, Workload())
        self.rl, self.loss = rl, loss_of(rl)
        self.form, self.mesh = sampling_form(self.of.spec, self.of.mesh)
        with jax.set_mesh(self.mesh):
            self.shards = slot_shards()
        self.slots = slots_of(config, self.shards)
        self.attention = pick_decode_backend("auto", "tpu", self.form.dtype)
        self.calls = sampling_calls(lengths, self.slots, self.shards)
        self.shares = shares_prompts(config, self.of.mesh)
        buffer, _ = learning_buffers(lengths, config.train, token_multiple(self.of.mesh), self.shares)
        self.shape = buffer["tokens"].shape[1:]
        self._places = {name: buffer[name].shape for name in Places._fields if name in buffer}

    # Memory on a chip, in bytes.

    @cached_property
    def weights(self) -> Any:
        """The sampler's weights, abstract."""
        return abstract(self.form.abstract_base, base_shardings(self.mesh, self.form))

    @cached_property
    def copied(self) -> int:
        """Bytes of the sampler's weights that are not shared with the learner's base."""
        return device_bytes(moved(self.of.base, self.weights))

    # Programs.

    def prefill(self) -> Program:
        """Prefill the prompts of a few groups and sample the first token of each answer."""
        rows, prompts = (
            min(SHARED_ROWS, self.slots // self.shards) * self.shards,
            SHARED_PROMPTS * self.shards,
        )
        array = self._array(self.mesh)
        step = make_prefill(self.form, self._stops, self.attention, sampling_of(self.rl))
        arguments = (
            *self._sampler,
            array(prompts, self.prompt),
            array(prompts),
            array(rows),
            array(rows),
            array(rows, 2, dtype=jnp.uint32),
            array(rows),
        )
        return self._sampling(
            self.of.compiled("prefill", self.mesh, step, arguments, prompts * self.prompt, 0)
        )

    def decode_step(self) -> Program:
        """Decode one token in every slot, reading as much of the cache as steps read on average."""
        step = make_decode(self.form, self._stops, self.attention, 1, sampling_of(self.rl))
        made = self.of.compiled(
            "decode step", self.mesh, step, self._sampler, self.slots, 0, window=self.calls.window
        )
        return self._sampling(made)

    def gradient(self) -> Program:
        """Compute the gradient of one full buffer."""
        of, trained = self.of, self.of.state.trained
        step = make_gradient_step(of.spec, of.compute, self.loss, "weighted")
        passes = self._kernel_passes * (1 + (of.compute.remat is True) + BACKWARD_PASSES)
        arguments = trained, trained, self.of.base, self._buffer(extras_of(self.loss))
        made = of.compiled("gradient", of.mesh, step, arguments, math.prod(self.shape), passes)
        return self._learning(made, device_bytes(of.state.opt_state))

    def reference(self) -> Program:
        """Log-probabilities of one full buffer under the base alone, for `rl.kl`."""
        of, base = self.of, replace(self.of.spec, lora=None, shapes=())
        step = make_logprob_step(base, of.compute, self.loss, "weighted")
        arguments: tuple[Any, ...] = {}, self.of.base, self._buffer(())
        passes = self._kernel_passes
        made = of.compiled("reference", of.mesh, step, arguments, math.prod(self.shape), passes)
        return self._learning(made, device_bytes((of.state, of.state.trained)))

    def update(self) -> Program:
        """An optimizer step."""
        of, rate = self.of, self._array(self.of.mesh)(dtype=jnp.float32)
        step = make_update_step(of.spec, of.config.optim)
        made = of.compiled("update", of.mesh, step, (of.state, of.state.trained, rate), 0, 0)
        return self._learning(made, device_bytes(self.of.base))

    @property
    def _stops(self) -> tuple[int, ...]:
        return self.of.model.eos_token_ids

    @property
    def _sampler(self) -> tuple[DecodeState, Any, Any]:
        """State, adapter and weights, abstract."""
        adapter: Any = {}
        if self.form.lora is not None:
            trained = self.of.state.trained
            adapter = abstract(trained, trained_shardings(self.mesh, self.of.spec, trained))
        length, most = cache_length(self.longest), self.rl.max_new_tokens
        with jax.set_mesh(self.mesh):
            state = abstract_decode(self.form, self.slots, length, most, sampling_of(self.rl))
        return state, adapter, self.weights

    def _sampling(self, program: Program) -> Program:
        """Add what else is held: optimizer state, masters that are not arguments, and `rl.overlap`'s copy."""
        state, held = self.of.state, device_bytes(self.of.state.opt_state)
        held += device_bytes(state.trained) * (self.of.spec.full + self.rl.overlap)
        held += device_bytes(self.of.base) + self.copied - device_bytes(self.weights)
        return replace(program, memory=replace(program.memory, held=held))

    def _learning(self, program: Program, held: int) -> Program:
        """Add what else is held: `held` bytes, and the sampler's copy of a base."""
        held += 0 if self.of.spec.full else self.copied
        return replace(program, memory=replace(program.memory, held=held))

    def _buffer(self, extras: tuple[str, ...]) -> Any:
        lines, length = self.shape
        batch = self.of.batch(1, length, lines)
        places = {name: self._array(self.of.mesh)(*shape) for name, shape in self._places.items()}
        return batch | places | dict.fromkeys(extras, batch["weights"])

    @property
    def _kernel_passes(self) -> float:
        """Passes of the attention kernel over a buffer, relative to one of the buffer's own length.

        With shared prompts, the kernel runs over their copies.
        """
        wide = self._places["wide"][-1] / self.shape[-1] if self.shares else 1.0
        return self.of.kernel_passes * wide**2

    @staticmethod
    def _array(mesh: Any) -> Callable[..., jax.ShapeDtypeStruct]:
        whole = replicated(mesh)
        return lambda *shape, dtype=jnp.int32: jax.ShapeDtypeStruct(shape, dtype, sharding=whole)


# --- The plan -----------------------------------------------------------------------------------------------


def plan_rewards(
    config: RunConfig, model: ModelConfig, slice_: Slice, expected: Expected, price: float | None = None
) -> RewardsPlan:
    """Compile a run's programs for the slice, and work out its time and cost.

    Args:
      price: dollars per chip-hour.

    Raises:
      UserError: settings that `jaxlora rl` refuses.
    """
    check_settings(config)
    rl = config.rl
    lengths = expected.lengths(rl, rl.group)
    programs = RewardPrograms(config, model, slice_, lengths)
    makers = [programs.prefill, programs.decode_step, programs.gradient, programs.update]
    makers += [programs.reference] if rl.kl else []
    done = []
    with progress_bar(f"compiling for {slice_.name}", len(makers), "programs") as advance:
        for make in makers:
            done.append(make())
            advance(1)
    fits = all_fit(done, slice_)
    seconds = run = standard = rate = None
    if fits:
        one = grading_seconds(rl)
        seconds = batch_seconds(programs, done, lengths, one)
        whole = sum(value or 0 for value in seconds.values())
        rate = float(lengths.answers.sum()) / whole
        run = cost_of(whole * rl.steps, slice_.n_chips, price)
        problems, group = STANDARD
        other = batch_seconds(programs, done, expected.lengths(rl, group), one)
        batches = problems / rl.prompts
        standard = cost_of(sum(value or 0 for value in other.values()) * batches, slice_.n_chips, price)
    return RewardsPlan(
        slice=slice_,
        mesh=dict(programs.of.mesh.shape),
        shared=programs.copied == 0,
        programs=done,
        fits=fits,
        answer_tokens=float(lengths.answers.mean()),
        seconds=seconds,
        tokens_per_second=rate,
        run=run,
        standard=standard,
        advice=None if fits else what_would_fit(config, model, slice_, programs.longest),
    )


def batch_seconds(
    programs: RewardPrograms, done: list[Program], lengths: Lengths, one: float | None
) -> dict[str, float | None]:
    """The time of each phase of a batch, assuming that no group has constant rewards.

    Args:
      done: compiled programs, in the order of `plan_rewards`.
      one: seconds to grade one answer.
    """
    prefill, decode, gradient, update, *reference = (program.best.likely for program in done)
    calls = sampling_calls(lengths, programs.slots, programs.shards)
    multiple = token_multiple(programs.of.mesh)
    buffer, buffers = learning_buffers(lengths, programs.of.config.train, multiple, programs.shares)
    buffers *= buffer["tokens"].size / math.prod(programs.shape)
    return {
        "sampling": calls.prefills * prefill + calls.steps * decode,
        "scoring": None if one is None else one * len(lengths.answers),
        "learning": buffers * (gradient + sum(reference)) + programs.rl.updates_per_batch * update,
    }


_BOXES = (("42", "42"), ("42", "41"), (r"\frac{3}{4}", "0.75"), ("x^2-1", "(x-1)(x+1)"))


def grading_seconds(rl: RLConfig) -> float | None:
    """Seconds to grade an answer on this machine, for answers of which a quarter need algebra.

    None if grading needs the run's own problems, or a package that is not installed.
    """
    if rl.reward == "reasoning_gym" or ":" in rl.reward:
        return None
    answers = [
        (Problem(str(i), [], gold, {}), f"So it is {i}: \\boxed{{{box}}}", False)
        for i in range(GRADED)
        for gold, box in [_BOXES[i % len(_BOXES)]]
    ]
    try:
        with grader_named(rl.reward, format_weight=rl.format_weight, time_limit_s=rl.time_limit_s) as grader:
            grader.grade(answers[: len(_BOXES)])
            start = time.perf_counter()
            grader.grade(answers)
            return (time.perf_counter() - start) / GRADED
    except UserError:
        return None


def what_would_fit(config: RunConfig, model: ModelConfig, slice_: Slice, longest: int) -> str:
    """Estimated advice: fewer slots or more rematerialisation, here or on the next larger slice."""
    larger = [s for s in SLICES.values() if s.chip == slice_.chip and s.n_chips > slice_.n_chips]
    for place in [slice_, *sorted(larger, key=lambda s: s.n_chips)]:
        for remat in dict.fromkeys((config.model.remat, "elementwise", True)):
            for slots in (config.rl.slots // part for part in (1, 2, 4, 8)):
                if slots < 1:
                    continue
                tried = replace(
                    config,
                    model=replace(config.model, remat=remat),
                    rl=replace(config.rl, slots=slots),
                )
                for choice, memory in choices(tried, model, place, longest):
                    if memory < FULL * place.chip.hbm_bytes:
                        where = "" if place is slice_ else f"on {place.name}, "
                        words = f"--config.mesh.data={choice.mesh.data} --config.mesh.fsdp=1"
                        words += f" --config.mesh.tensor={choice.mesh.tensor}"
                        words += f" --config.model.remat={str(remat).lower()} --config.rl.slots={slots}"
                        return f"{where}{words} should fit ({memory / GIB:.1f} GiB per chip, estimated)"
    return f"no {slice_.chip.name} slice in the table is large enough"


# --- Terminal output ----------------------------------------------------------------------------------------


def print_rewards(plan: RewardsPlan, console: Console) -> None:
    """Print a table of the programs, as each runs on one chip, then the time of a batch and of a run."""
    title = f"{plan.slice.name}: {plan.slice.n_chips} chips, mesh {plan.mesh}, learning from rewards"
    console.print(programs_table(plan.programs, plan.slice.chip, title))
    base = "the base is on the chips once: the sampler reads the learner's arrays"
    if not plan.shared:
        base = "the sampler keeps weights of its own: fsdp splits the learner's, or all are trained"
    console.print(base)
    for line in summary_lines(plan):
        console.print(line, soft_wrap=True)


def summary_lines(plan: RewardsPlan) -> list[str]:
    """Whether it fits, and likely seconds, hours and dollars."""
    if plan.seconds is None or plan.run is None or plan.standard is None:
        return [f"{plan.slice.name}: does not fit; {plan.advice}"]
    whole = sum(value or 0 for value in plan.seconds.values())
    parts = ", ".join(
        f"{name} not known beforehand" if value is None else f"{name} {value:.3g} s ({value / whole:.0%})"
        for name, value in plan.seconds.items()
    )
    problems, group = STANDARD
    return [
        f"a batch: likely {whole:.3g} s: {parts}; answers of {plan.answer_tokens:,.0f} tokens on average",
        f"{plan.slice.name}: fits; likely {plan.tokens_per_second:,.0f} sampled tokens/s,"
        f" {_told(plan.run)} for this configuration without its evaluations,"
        f" {_told(plan.standard)} for {problems:,} problems x {group} answers",
    ]


def _told(cost: RunCost) -> str:
    return f"{cost.hours:.2f} h" + ("" if cost.dollars is None else f" (${cost.dollars:,.2f})")
