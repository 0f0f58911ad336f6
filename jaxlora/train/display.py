"""What a person sees while a run trains: a progress line, announcements, and the validation picture."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from jaxlora.models.table import count_matrix_parameters
from jaxlora.runtime.devices import memory_in_use, peak_flops
from jaxlora.runtime.progress import console
from jaxlora.train.job import Job, token_count

WINDOW = 50  # steps over which speed is averaged


class TrainingDisplay:
    """The live progress line of the runs that are trained together, and the speeds that go into metrics."""

    def __init__(self, jobs: Sequence[Job], first_step: int):
        self._jobs, self._job = jobs, jobs[0]
        self._shapes: set[tuple[str, tuple[int, ...]]] = set()
        self._times: deque[tuple[float, int]] = deque(maxlen=WINDOW)
        self._flops_per_token = 4 * count_matrix_parameters(self._job.spec.config)
        device = jax.local_devices()[0]
        self._device = device
        peak = peak_flops(device)
        self._peak = peak * self._job.mesh.size if peak else None
        self._validation_seconds: float | None = None
        self._validation_start = 0.0
        columns = (
            TextColumn("{task.description}", markup=False),  # run ids may look like markup
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TextColumn("{task.fields[line]}", markup=False),
        )
        self._progress = Progress(*columns, console=console)
        name = self._job.config.run_id
        if len(jobs) > 1:
            name += f" and {len(jobs) - 1} more"
        steps = self._job.plan.total_steps
        self._task = self._progress.add_task(name, total=steps, completed=first_step - 1, line="compiling")

    def __enter__(self) -> TrainingDisplay:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def announce_shape(self, what: str, shape: tuple[int, ...]) -> None:
        """Say when a program is about to be compiled; the first time takes seconds to minutes."""
        if (what, shape) not in self._shapes:
            self._shapes.add((what, shape))
            console.print(
                f"[dim]compiling the {what} for buffers of {shape[0]} x {shape[1]} x {shape[2]}[/dim]"
            )

    def rate(self, tokens: int, runs: int) -> dict[str, float | None]:
        """Seconds of a step, tokens a second over the last steps, model FLOPs utilisation, peak memory.

        Speed and utilisation are those of all runs together; the step's seconds are shared out among them,
        so that the seconds of all runs add up to the time that was spent. Utilisation counts 4N FLOPs a real
        token (forward 2N, activation gradients 2N) against the devices' dense bf16 peak; null where the peak
        is not known.

        Args:
          tokens: of the step, of all runs.
          runs: how many took it.
        """
        now = time.monotonic()
        seconds = (now - self._times[-1][0]) / max(1, runs) if self._times else None
        self._times.append((now, tokens))
        span = self._times[-1][0] - self._times[0][0]
        speed = sum(n for _, n in list(self._times)[1:]) / span if span > 0 else None
        utilisation = speed * self._flops_per_token / self._peak if speed and self._peak else None
        memory = memory_in_use(self._device)
        return {
            "seconds": seconds,
            "tokens_per_second": speed,
            "model_flops_utilisation": utilisation,
            "peak_memory_bytes": memory,
        }

    def show(self, step: int, losses: Sequence[float], speed: dict[str, float | None]) -> None:
        """Update the progress line with each run's loss at a step and the speed."""
        parts = ["loss " + " ".join(f"{loss:.4f}" for loss in losses)]
        if speed["tokens_per_second"]:
            parts.append(f"{speed['tokens_per_second']:,.0f} tokens/s")
        if speed["model_flops_utilisation"]:
            parts.append(f"{speed['model_flops_utilisation']:.1%} MFU")
        parts.append(f"ETA {self._remaining(step)}")
        self._progress.update(self._task, completed=step, line=" · ".join(parts))

    def validating(self, batch: int) -> None:
        """Show the progress of a validation."""
        if batch == 1:
            self._validation_start = time.monotonic()
        total = -(-len(self._job.validation_rows) // self._job.validation_layout.batch_rows)
        self._progress.update(self._task, line=f"validating, batch {batch} of {total}")

    def validated(self, step: int, runs: Mapping[str, Mapping[int, float]]) -> None:
        """Print each run's result from its validations so far; leave their time out of the speed."""
        self._validation_seconds = time.monotonic() - self._validation_start
        for name, nll in runs.items():
            mark = " (best so far)" if nll[step] <= min(nll.values()) else ""
            who = f"{name}, " if len(self._jobs) > 1 else ""
            console.print(f"{who}step {step}: validation mean NLL {nll[step]:.5f}{mark}", markup=False)
        self._times.clear()

    def _remaining(self, step: int) -> str:
        """Time to the end, validations included; a validation not yet timed counts a third of a pass."""
        job = self._job
        if len(self._times) < 2:
            return "-"
        span = self._times[-1][0] - self._times[0][0]
        speed = sum(n for _, n in list(self._times)[1:]) / span if span > 0 else 0
        if not speed:
            return "-"
        mean_tokens = sum(token_count(j.train_rows) / j.plan.steps_per_epoch for j in self._jobs)
        left = (job.plan.total_steps - step) * mean_tokens / speed
        one = self._validation_seconds or len(self._jobs) * token_count(job.validation_rows) / (3 * speed)
        left += one * sum(s > step for s in job.plan.validation_steps)
        minutes, seconds = divmod(int(left), 60)
        hours, minutes = divmod(minutes, 60)
        return f"{hours}:{minutes:02}:{seconds:02}"


def draw_validation(path: Path, validations: dict[int, float], selected: int, title: str) -> None:
    """Validation mean NLL by step, the selected checkpoint marked, as PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes = figure.add_subplot()
    steps = sorted(validations)
    axes.plot(steps, [validations[s] for s in steps], "o-", color="#0072B2", label="validation")
    axes.plot(
        [selected], [validations[selected]], "s", color="#D55E00", markersize=9, label=f"selected: {selected}"
    )
    axes.set(xlabel="step", ylabel="validation mean NLL (nats per answer token)", title=title)
    axes.legend()
    figure.savefig(path, dpi=150, metadata={"Software": None})
