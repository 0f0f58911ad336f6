"""The benchmark of learning from rewards: whole batches with answers of prescribed lengths.

    result = bench_rl(config, model, prompt_lengths, answer_lengths, steps=1)

A batch is sampled, decoded to text, graded and learned from by the programs and classes of a real run, with
three differences: the lengths of answers are forced, the tokenizer is a stand-in, and whatever the grader
says, every other answer of a group counts as correct. So all answers of each batch contribute to learning,
and no batch needs a program that the first did not. Sampled tokens are counted end to end. Prompt tokens are
counted separately; they are read once per group when sampling and once per answer when learning. If prompts
are shared when learning, `tokens_computed` is the number of tokens for which everything but attention is
computed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import numpy as np

from jaxlora.bench import CompileCounter, device_facts, utilisation, warm_up_runs
from jaxlora.bench import wire as wire_bench
from jaxlora.checkpoints.base import Base, random_base
from jaxlora.config import RunConfig
from jaxlora.lora import count_trainable, init_lora
from jaxlora.models.decoder import ModelSpec
from jaxlora.models.families import count_matrix_parameters
from jaxlora.models.spec import ModelConfig
from jaxlora.rl.job import RLJob
from jaxlora.rl.learning import Learned, Learner
from jaxlora.rl.problems import Problem
from jaxlora.rl.rewards import Graded, Grader, grader_named
from jaxlora.rl.sampling import Group, Sampler, grade_groups, shared_bytes
from jaxlora.runtime.devices import memory_in_use
from jaxlora.runtime.progress import console, progress_bar
from jaxlora.sharding import place_trained
from jaxlora.train.schedule import RunPlan
from jaxlora.train.step import Machine, init_state


class _Words:
    """A stand-in tokenizer: its text has as many words as there are tokens, and ends in a box."""

    def decode(self, ids: Sequence[int]) -> str:
        return " ".join(map(str, ids)) + f" \\boxed{{{sum(ids) % 2}}}"


def bench_rl(
    config: RunConfig, model: ModelConfig, prompts: list[int], answers: list[int], steps: int
) -> dict[str, Any]:
    """Time batches of `rl.prompts` prompts with `rl.group` answers each, after all programs are compiled.

    Args:
      prompts, answers: lengths in tokens; those of answers are ordered by group.

    Raises:
      UserError: the configuration asks for a mesh or an attention kernel that this machine does not have.
    """
    config = replace(config, rl=replace(config.rl, max_new_tokens=max(answers)))
    mesh, spec, compute = wire_bench(config, model)
    spec = replace(spec, scan=False)
    facts = device_facts()
    machine = Machine(mesh, compute.backend, False, compute.remat)
    job = _job(config, spec, machine, prompts)
    frozen = jax.block_until_ready(random_base(spec, 0, mesh))
    with jax.set_mesh(mesh):
        state = init_state(place_trained(mesh, spec, init_lora(spec, 0)), config.optim)
        sampler, learner = Sampler(job, frozen), Learner(spec, machine, config, job.loss, frozen)
        with CompileCounter() as compiled, grader_named("gsm8k_strict") as grader:
            batch = partial(_step, job, sampler, learner, grader, answers)
            state = _warm_up(batch, state)
            before = len(compiled.events)
            times = np.zeros(3)
            start = time.perf_counter()
            for step in range(1, steps + 1):
                state, own, done = batch(state, step, config.optim.peak_lr)
                times += own
            seconds = time.perf_counter() - start
        again = len(compiled.events) - before
        own_bytes, twice = shared_bytes(frozen, sampler.decoding(state.trained)[2])
    memory = memory_in_use(jax.devices()[0])
    sampled, read = steps * sum(answers), steps * sum(prompts)
    learned = steps * (sum(answers) + config.rl.group * sum(prompts))
    used = utilisation(steps * done.computed / times[2], 4 * count_matrix_parameters(model), facts)
    return facts | {
        "benchmark": "rl",
        "trainable_parameters": count_trainable(spec),
        "attention": compute.backend,
        "prompts": len(prompts),
        "group": config.rl.group,
        "slots": config.rl.slots,
        "batches": steps,
        "answers_learned_from": done.rows,
        "sampled_tokens": sampled,
        "prompt_tokens_read": read,
        "tokens_learned_from": learned,
        "tokens_computed": steps * done.computed,
        **_rates(sampled, learned, times, seconds),
        "learning_utilisation": used["model_flops_utilisation"],
        "compilations": before,
        "compilations_while_timed": again,
        "compile_seconds": sum(compiled.events),
        "base_gib": own_bytes / 2**30,
        "base_second_copies_gib": twice / 2**30,
        "peak_memory_gib": memory / 2**30 if memory else None,
    }


def _rates(sampled: int, learned: int, times: np.ndarray, seconds: float) -> dict[str, float]:
    """Seconds of sampling, grading and learning, and tokens per second."""
    return {
        "seconds": seconds,
        "sampling_seconds": times[0],
        "grading_seconds": times[1],
        "learning_seconds": times[2],
        "sampled_tokens_per_second": sampled / seconds,
        "sampled_and_prompt_tokens_per_second": learned / seconds,
        "sampling_tokens_per_second": sampled / times[0],
        "learning_tokens_per_second": learned / times[2],
    }


def _job(config: RunConfig, spec: ModelSpec, machine: Machine, lengths: Sequence[int]) -> RLJob:
    """A job with random prompts, in which no token ends an answer."""
    rng = np.random.default_rng(0)
    ids = [rng.integers(0, spec.config.vocab_size, n).tolist() for n in lengths]
    problems = [Problem(str(i), [], "1", {}) for i in range(len(ids))]
    plan = RunPlan(len(ids), len(ids), 1, 1, 0, (), 0)
    base = Base(config.model, None, spec.config, 0)
    return RLJob(config, base, spec, machine, _Words(), (), problems, ids, [], [], plan)  # type: ignore[arg-type]


def _warm_up(batch: Callable[..., Any], state: Any) -> Any:
    """Run every program that the timed batches need, at a learning rate of 0. It takes a whole batch, because
    the decoder has a separate program for each number of slots that it continues with."""
    console.print("compiling")
    for _ in range(warm_up_runs()):
        state, *_ = batch(state, 0, rate=0.0)
    return state


def _by_position(job: RLJob, answers: Sequence[int]) -> list[int]:
    """The answer lengths in the order in which the problem stream yields the groups."""
    group = job.config.rl.group
    return [n for p in range(job.config.rl.prompts) for n in answers[job.at(p) * group :][:group]]


def _halved(group: Group) -> Group:
    """The group with every other answer marked correct."""
    graded = (Graded(float(i % 2), bool(i % 2), True) for i in range(len(group.episodes)))
    pairs = zip(group.episodes, graded, strict=True)
    return replace(group, episodes=tuple(replace(one, graded=own) for one, own in pairs))


def _step(
    job: RLJob,
    sampler: Sampler,
    learner: Learner,
    grader: Grader,
    answers: Sequence[int],
    state: Any,
    step: int,
    rate: float,
) -> tuple[Any, list[float], Learned]:
    """Run one batch; return the new state, the seconds of its three phases, and what was learned from."""
    rl = job.config.rl
    clock = [time.perf_counter()]
    limits = _by_position(job, answers)
    with progress_bar("sampling", len(answers), "answers") as advance:
        groups = sampler.groups(state.trained, step, range(rl.prompts), advance, limits)
    clock.append(time.perf_counter())
    groups = [_halved(group) for group in grade_groups(groups, grader)]
    clock.append(time.perf_counter())
    state, learned = learner.learn(state, groups, rate)
    jax.block_until_ready(state)
    clock.append(time.perf_counter())
    return state, np.diff(clock).tolist(), learned
