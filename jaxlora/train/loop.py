"""The training loop: steps, validation, checkpoints, metrics; resumable at any step.

    result = train(job)      # -> selected step and its validation NLL; the rest is in job.config.run_dir

The loop runs ahead of the device: metrics are read two steps late, so that the device never waits for the
host. The order of work is a function of the step alone.
"""

from __future__ import annotations

import shutil
import signal
import traceback
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlora.checkpoints.huggingface import load_base, random_base
from jaxlora.checkpoints.peft import export_adapter
from jaxlora.checkpoints.run_state import RunState
from jaxlora.data.batches import train_batches, validation_batches
from jaxlora.lora import check_lora, count_trainable, init_lora
from jaxlora.models.qwen3 import Tree
from jaxlora.progress import console
from jaxlora.records import append_jsonl
from jaxlora.sharding import place_batch, place_lora
from jaxlora.study.selection import select_checkpoint
from jaxlora.train.artifacts import RunDirectory
from jaxlora.train.display import TrainingDisplay
from jaxlora.train.job import Job
from jaxlora.train.schedule import learning_rate
from jaxlora.train.step import TrainState, init_state, make_eval_step, make_train_step

LATE = 2  # steps between dispatch and reading the metrics


class Interrupted(Exception):
    """Training was asked to stop (Ctrl-C or SIGTERM) and has saved; `signum` says by what."""

    def __init__(self, signum: int, step: int):
        super().__init__(f"stopped at step {step}; the same command resumes")
        self.signum = signum


@dataclass(frozen=True)
class TrainResult:
    """The selected checkpoint and the base it was trained on (kept for an evaluation right after)."""

    step: int
    mean_nll: float
    frozen: Tree
    lora: Tree


def load_frozen(job: Job) -> Tree:
    """The base of a job, from its directory or drawn at random."""
    if job.model_dir is None or job.config.model.random_weights:
        return random_base(job.spec, job.config.seed, job.mesh)
    return load_base(job.model_dir, job.spec, job.mesh)


def train(job: Job) -> TrainResult:
    """Train (or resume) the job's run and write its directory.

    Raises:
      UserError: the run exists and is finished, or belongs to another configuration.
      Interrupted: a signal asked to stop; the run is saved and resumes with the same command.
    """
    run = RunDirectory.open(job)
    stage: dict[str, Any] = {"name": "loading", "step": 0}
    try:
        with jax.set_mesh(job.mesh), RunState(run.path / "checkpoints") as store:
            return _train(job, run, store, stage)
    except (Interrupted, KeyboardInterrupt):
        raise
    except BaseException as error:
        run.write_failure(stage["name"], stage["step"], error, traceback.format_exc())
        raise


def _train(job: Job, run: RunDirectory, store: RunState, stage: dict[str, Any]) -> TrainResult:
    config, plan = job.config, job.plan
    lora = place_lora(job.mesh, job.spec, init_lora(job.spec, config.seed))
    check_lora(job.spec, lora)
    assert sum(x.size for x in jax.tree.leaves(lora)) == count_trainable(job.spec)
    state = init_state(lora, config.optim)
    validations: dict[int, float] = {}
    first = 1
    if store.steps():
        done, state, progress = store.restore(like=state)
        validations = {int(step): nll for step, nll in progress["validations"]}
        first = done + 1
        console.print(f"resuming {config.run_id} after step {done}")
    run.rewind(first - 1)
    frozen = load_frozen(job)

    train_step = make_train_step(job.spec, config.optim, job.compute(job.train_layout))
    eval_step = make_eval_step(job.spec, job.compute(job.validation_layout))
    waiting: deque[tuple[int, dict[str, jax.Array], int, float]] = deque()

    with stop_signals() as stop, TrainingDisplay(job, first) as display, run.tensorboard() as board:

        def read(entry) -> None:
            step, arrays, tokens, rate = entry
            values = {name: float(value) for name, value in jax.device_get(arrays).items()}
            if not np.isfinite([values["nll"], values["grad_norm"]]).all():
                rows = ", ".join(job.train_rows[i].row_id for i in plan.rows_of_step(step))
                raise FloatingPointError(
                    f"step {step}: loss {values['nll']}, gradient norm {values['grad_norm']} at learning rate"
                    f" {rate:g}; rows {rows}. The checkpoints before it are good"
                )
            record = run.step_record(step, values, tokens, rate, display.rate(step, tokens))
            append_jsonl(run.path / "metrics.jsonl", record)
            board.write(record)
            display.show(step, record)

        def save(step: int) -> None:
            store.save(step, state, {"validations": sorted(validations.items())})

        for step, batch in train_batches(job.train_rows, plan, job.train_layout, first):
            stage.update(name="training", step=step)
            rate = learning_rate(step, config.optim, plan)
            tokens = sum(job.train_rows[i].n_tokens for i in plan.rows_of_step(step))
            display.announce_shape("training step", batch["tokens"].shape)
            state, arrays = train_step(state, frozen, place_batch(job.mesh, batch), jnp.float32(rate))
            waiting.append((step, arrays, tokens, rate))
            while len(waiting) > LATE:
                read(waiting.popleft())
            ends_here = step in plan.validation_steps
            if ends_here or stop.signum is not None:
                while waiting:
                    read(waiting.popleft())
            if ends_here:
                stage["name"] = "validation"
                validations[step] = _validate(job, eval_step, state.lora, frozen, display)
                record = run.validation_record(step, validations[step])
                append_jsonl(run.path / "metrics.jsonl", record)
                board.write(record)
                display.validated(step, validations)
                stage["name"] = "saving"
                save(step)
                best = select_checkpoint(validations)
                store.keep({best, *store.steps()[-2:]})
            if stop.signum is not None:
                if not ends_here:
                    save(step)
                raise Interrupted(stop.signum, step)

    stage["name"] = "selection"
    best = select_checkpoint(validations)
    _, selected, _ = store.restore(like=state, step=best)
    _export_selected(job, run, selected, best)
    run.finish(best, validations)
    return TrainResult(best, validations[best], frozen, selected.lora)


def _validate(job: Job, eval_step, lora: Tree, frozen: Tree, display: TrainingDisplay) -> float:
    """Mean NLL over all weighted validation tokens."""
    sums = []
    for batch in validation_batches(job.validation_rows, job.validation_layout):
        display.announce_shape("validation step", batch["tokens"].shape)
        sums.append(eval_step(lora, frozen, place_batch(job.mesh, batch)))
        display.validating(len(sums))
    totals = np.asarray(jax.device_get(sums), np.float64).sum(axis=0)
    return float(totals[0] / totals[1])


def _export_selected(job: Job, run: RunDirectory, selected: TrainState, step: int) -> None:
    """The selected adapter as a PEFT folder inside the run directory."""
    folder = run.path / "selected"
    shutil.rmtree(folder, ignore_errors=True)
    extra = {"run_id": job.config.run_id, "step": step}
    export_adapter(folder, job.spec, selected.lora, job.config.model.path, seed=job.config.seed, extra=extra)


@dataclass
class _Stop:
    signum: int | None = None


@contextmanager
def stop_signals() -> Iterator[_Stop]:
    """Catch the first Ctrl-C or SIGTERM so that the loop can save; a second Ctrl-C stops at once."""
    stop = _Stop()

    def on_signal(signum: int, _frame: object) -> None:
        if stop.signum is not None and signum == signal.SIGINT:
            raise KeyboardInterrupt
        stop.signum = signum
        console.print("stopping after this step; the run is saved and resumes with the same command")

    previous = {signum: signal.signal(signum, on_signal) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)
