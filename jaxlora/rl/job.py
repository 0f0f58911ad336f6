"""Everything about a run that learns from rewards that can be determined before a model is loaded.

job = prepare(config)          # reads config.json, tokenizer and problems; UserError if anything is wrong
print(describe(job))           # the plan: problems, steps, episodes, tokens, memory
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from rich.table import Table

from jaxlora.checkpoints.base import Base, find_base
from jaxlora.config import RLConfig, RunConfig
from jaxlora.data.batches import shuffled
from jaxlora.data.render import Tokenizer, render_chat
from jaxlora.generate.decode import abstract_decode
from jaxlora.models.decoder import ModelSpec
from jaxlora.models.spec import check_positions
from jaxlora.rl.mesh import (
    cache_length,
    is_dense,
    mesh_for_both,
    moved,
    sampling_form,
    sampling_of,
    shares_prompts,
    slots_of,
)
from jaxlora.rl.problems import Problem, load_problems
from jaxlora.rl.rewards import NAMED, check_problems, grader_named, try_import
from jaxlora.rl.shared_buffers import WIDER
from jaxlora.runtime.errors import UserError
from jaxlora.runtime.progress import console
from jaxlora.sharding import abstract, base_shardings, device_bytes, slot_shards
from jaxlora.train.job import (
    abstract_frozen,
    abstract_state,
    describe_model,
    room_of,
    step_memory,
    table_of,
    trained_spec,
)
from jaxlora.train.objective import Loss
from jaxlora.train.schedule import RunPlan
from jaxlora.train.step import Machine, wire
from jaxlora.train.tracking import check_tracking

COPY = "copy for the sampler"
SMALLER = "rl.slots or train.max_buffer_tokens smaller, or model.remat=elementwise"
FEW = 4  # answers per group below which the group's mean is a poor baseline


@dataclass(frozen=True)
class RLJob:
    """A checked run: configuration, model shape, and tokenised problems, but no weights."""

    config: RunConfig
    base: Base
    spec: ModelSpec
    machine: Machine
    tokenizer: Tokenizer
    stop_ids: tuple[int, ...]
    problems: list[Problem]
    prompts: list[list[int]]
    eval_problems: list[Problem]
    eval_prompts: list[list[int]]
    plan: RunPlan

    @property
    def mesh(self) -> jax.sharding.Mesh:
        return self.machine.mesh

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt plus the longest answer."""
        return max(map(len, [*self.prompts, *self.eval_prompts])) + self.config.rl.max_new_tokens

    @property
    def loss(self) -> Loss:
        return loss_of(self.config.rl)

    def at(self, position: int) -> int:
        """The problem at a position of the endless stream, which is reshuffled each epoch."""
        epoch, place = divmod(position, len(self.problems))
        return int(shuffled(len(self.problems), self.config.seed, epoch + 1)[place])


def loss_of(rl: RLConfig) -> Loss:
    """The objective and its settings."""
    return Loss(rl.loss, rl.clip_low, rl.clip_high, rl.beta, rl.kl, rl.temperature)


def prepare(config: RunConfig, with_weights: bool = True) -> RLJob:
    """Check and count everything; nothing is written and no weights are loaded.

    Args:
      with_weights: fetch the weights of a Hub model; if false, only its shape (for plans).

    Raises:
      UserError: for anything that would stop the run, in one line that says what to do.
    """
    rl = config.rl
    check_settings(config)
    check_tracking(config)
    grader = grader_named(rl.reward, format_weight=rl.format_weight, time_limit_s=rl.time_limit_s)
    problems = _problems(config, rl.problems, rl.problem_rows)
    held_out = _problems(config, rl.eval_problems, rl.eval_rows) if rl.eval_problems else []
    _warn(config, problems, held_out)
    if rl.reward not in NAMED:
        try_import(grader)
    base = find_base(config.model, config.seed, with_weights)
    if config.train.what == "full" and base.folder is None:
        raise UserError("config.train.what: the base is only a shape; give a directory to train in full")
    tokenizer = base.tokenizer()
    prompts, eval_prompts = (_prompts(tokenizer, found) for found in (problems, held_out))
    longest = max(map(len, [*prompts, *eval_prompts])) + rl.max_new_tokens
    check_positions(base.config, longest, "config.rl.max_new_tokens: the longest prompt and its answer")
    config, spec = trained_spec(config, base)
    config = mesh_for_both(config, base.config, longest)
    return RLJob(
        config=config,
        base=base,
        spec=replace(spec, scan=False),  # the sampler reads the learner's arrays layer by layer
        machine=replace(wire(config.model, config.mesh), scan=False),
        tokenizer=tokenizer,
        stop_ids=tuple(base.stop_ids(tokenizer)),
        problems=problems,
        prompts=prompts,
        eval_problems=held_out,
        eval_prompts=eval_prompts,
        plan=_plan(config, len(problems)),
    )


def check_settings(config: RunConfig) -> None:
    """Refuse settings that are valid on their own but not together, or that would bias learning.

    Raises:
      UserError: names the field and what to set.
    """
    rl = config.rl
    if rl.top_p < 1:
        raise UserError(
            "config.rl.top_p: filtering would change the sampler's distribution, but not the learner's;"
            " give 1 (evaluation is greedy)"
        )
    if not rl.clip_low < rl.clip_high:
        raise UserError(f"config.rl.clip_low: {rl.clip_low:g} must be below clip_high, {rl.clip_high:g}")
    if rl.updates_per_batch > rl.prompts:
        raise UserError(
            f"config.rl.updates_per_batch: {rl.updates_per_batch} updates need as many prompts, but a batch"
            f" has {rl.prompts}; give at most {rl.prompts}"
        )
    if rl.kl and config.train.what == "full":
        raise UserError("config.rl.kl: train.what=full keeps no base to measure the divergence from; give 0")
    if config.lora.dropout:
        raise UserError(
            "config.lora.dropout: answers are sampled without dropout, so ratios would be wrong; give 0"
        )
    if config.model.layers == "scan":
        raise UserError("config.model.layers: sampler and learner share unstacked layers; give unroll")


def _problems(config: RunConfig, path: str, limit: int | None) -> list[Problem]:
    rl = config.rl
    found = load_problems(path, limit, system=rl.system, suffix=rl.suffix or "")
    check_problems(rl.reward, found)
    return found


def _warn(config: RunConfig, problems: Sequence[Problem], held_out: Sequence[Problem]) -> None:
    """Warn about settings that are allowed but seldom intended."""
    if config.rl.group < FEW:
        console.print(f"rl.group: the mean of {config.rl.group} rewards is a poor baseline", markup=False)
    known = {str(problem.messages) for problem in problems}
    if shared := sum(str(problem.messages) in known for problem in held_out):
        console.print(
            f"{shared:,} of {len(held_out):,} held-out problems are also in the training problems",
            markup=False,
        )


def _prompts(tokenizer: Tokenizer, problems: Sequence[Problem]) -> list[list[int]]:
    found = []
    for problem in problems:
        try:
            found.append(render_chat(tokenizer, problem.messages))  # type: ignore[arg-type]
        except UserError as error:
            raise UserError(f"problem {problem.id}: {error}") from None
    return found


def _plan(config: RunConfig, n_problems: int) -> RunPlan:
    """Steps and warm-up; evaluations have a schedule of their own."""
    rl, optim = config.rl, config.optim
    warmup = round(optim.warmup_fraction * rl.steps) if optim.schedule == "cosine" else 0
    every = {*range(0, rl.steps, rl.eval_every), rl.steps} if rl.eval_problems else set()
    an_epoch = math.ceil(n_problems / rl.prompts)
    return RunPlan(n_problems, rl.prompts, an_epoch, rl.steps, warmup, tuple(sorted(every)), config.seed)


def estimate_memory(job: RLJob) -> dict[str, int]:
    """Bytes that a run needs on one device: exact for arrays that persist, otherwise to about a fifth.

    Sampling and learning alternate unless they overlap, so only the larger of the KV cache and the
    activations with the output head counts.
    """
    rl = job.config.rl
    parts = step_memory(job, job.config.train.max_buffer_tokens * job.machine.lines)
    state, form, mesh = abstract_state(job), *sampling_form(job.spec, job.mesh)
    base = abstract_frozen(job)
    found = {"base": device_bytes(base)} if base else {}
    found["trained weights, gradients and moments"] = device_bytes((state, state.trained))
    if copy := device_bytes(moved(base, abstract(form.abstract_base, base_shardings(mesh, form)))):
        found[COPY] = copy
    with jax.set_mesh(mesh):
        slots = slots_of(job.config, slot_shards())
        length, most = cache_length(job.longest), rl.max_new_tokens
        cache = device_bytes(abstract_decode(form, slots, length, most, sampling_of(rl)))
    learning = (parts["activations"] + copies_memory(job)) // job.mesh.size + parts["output head"]
    if rl.overlap:
        return found | {"cache of the sampler": cache, "activations and head": learning}
    name = "cache of the sampler" if cache > learning else "activations and head"
    return found | {name: max(cache, learning)}


def copies_memory(job: RLJob) -> int:
    """Bytes kept for the backward pass of one buffer by attention over the copies of shared prompts."""
    if not shares_prompts(job.config, job.mesh):
        return 0
    model, remat = job.spec.config, job.config.model.remat
    copies = job.config.train.max_buffer_tokens * (1 if is_dense(job.machine.backend) else WIDER[-1])
    heads, kv_heads = model.num_attention_heads, model.num_key_value_heads
    kept = heads  # outputs
    if remat != "elementwise":
        kept += heads + 2 * kv_heads  # queries, keys, values
    layers = 1 if remat is True else model.num_hidden_layers
    return round(copies * kept * model.head_dim * layers * jnp.dtype(job.spec.dtype).itemsize)


def memory_here(job: RLJob) -> int:
    """Bytes needed on one device, or on all CPU devices together, since those share memory."""
    needed = sum(estimate_memory(job).values())
    return needed * (job.mesh.size if job.mesh.devices.flat[0].platform == "cpu" else 1)


def describe(job: RLJob) -> Table:
    """The plan as a table for the terminal."""
    config, rl = job.config, job.config.rl
    lengths = [len(prompt) for prompt in job.prompts]
    episodes = rl.steps * rl.prompts * rl.group
    memory = estimate_memory(job)
    parts = ", ".join(f"{name} {size / 2**30:.2f}" for name, size in memory.items())
    shared = "" if COPY in memory else "; the sampler reads the learner's base"
    device = jax.devices()[0]
    loss = f"{rl.loss}, temperature {rl.temperature:g}" + (f", divergence {rl.kl:g}" if rl.kl else "")
    rows = describe_model(job) | {
        "problems": f"{len(job.problems):,} of {rl.problems}, prompts of {min(lengths)} to {max(lengths)}"
        f" tokens, mean {sum(lengths) / len(lengths):.0f}",
        "held out": f"{len(job.eval_problems):,} of {rl.eval_problems}, greedily, at steps"
        f" {', '.join(map(str, job.plan.validation_steps))}"
        if rl.eval_problems
        else "none",
        "reward": rl.reward + (f", format {rl.format_weight:g}" if rl.format_weight else ""),
        "steps": f"{rl.steps:,}, each {rl.prompts} prompts x {rl.group} answers, {rl.updates_per_batch}"
        f" update{'s' * (rl.updates_per_batch > 1)}; {rl.steps * rl.prompts / len(job.problems):.2f} passes",
        "episodes": f"{episodes:,}, at most {episodes * rl.max_new_tokens:,} sampled tokens;"
        f" at most {episodes:,} bits where rewards are 0 or 1",
        "objective": f"{loss}; baseline {rl.baseline}",
        "learning rate": f"{config.optim.peak_lr:g}, {config.optim.schedule}",
        "memory": f"about {sum(memory.values()) / 2**30:.2f} GiB a device: {parts}{shared}",
        "room": room_of(memory_here(job), device, SMALLER),
        "devices": f"{job.mesh.size} x {device.device_kind}, mesh {dict(job.mesh.shape)},"
        f" attention {job.machine.backend}",
    }
    return table_of(rows)
