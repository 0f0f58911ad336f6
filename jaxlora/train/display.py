"""What a person sees while a run trains: a progress line, announcements, and the validation picture."""

from __future__ import annotations

import time
from collections import deque
from pathlib import Path

import jax
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.text import Text

from jaxlora.devices import memory_in_use, peak_flops
from jaxlora.models.parameters import count_matrix_parameters
from jaxlora.progress import console
from jaxlora.train.job import Job, token_count

WINDOW = 50  # steps over which speed is averaged


class TrainingDisplay:
    """The live progress line of one run, and the speeds that go into its metrics."""

    def __init__(self, job: Job, first_step: int):
        self._job = job
        self._shapes: set[tuple[str, tuple[int, ...]]] = set()
        self._times: deque[tuple[float, int]] = deque(maxlen=WINDOW)
        self._flops_per_token = 4 * count_matrix_parameters(job.spec.config)
        device = jax.local_devices()[0]
        self._device = device
        peak = peak_flops(device)
        self._peak = peak * job.mesh.size if peak else None
        self._validation_seconds: float | None = None
        self._validation_start = 0.0
        self._first = first_step
        columns = (TextColumn("{task.description}"), BarColumn(bar_width=20), MofNCompleteColumn())
        self._progress = Progress(*columns, TextColumn("{task.fields[line]}"), console=console)
        self._task = self._progress.add_task(
            job.config.run_id, total=job.plan.total_steps, completed=first_step - 1, line="compiling"
        )

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

    def rate(self, step: int, tokens: int) -> dict[str, float | None]:
        """Seconds of this step, tokens a second over the last steps, model FLOPs utilisation, peak memory.

        Utilisation counts 4N FLOPs a real token (forward 2N, activation gradients 2N) against the devices'
        dense bf16 peak; null where the peak is not known.
        """
        now = time.monotonic()
        seconds = now - self._times[-1][0] if self._times else None
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

    def show(self, step: int, record: dict) -> None:
        """Update the progress line with a step's record."""
        parts = [f"loss {record['loss']:.4f}"]
        if record["tokens_per_second"]:
            parts.append(f"{record['tokens_per_second']:,.0f} tokens/s")
        if record["model_flops_utilisation"]:
            parts.append(f"{record['model_flops_utilisation']:.1%} MFU")
        parts.append(f"ETA {self._remaining(step)}")
        self._progress.update(self._task, completed=step, line=Text(" · ".join(parts)))

    def validating(self, batch: int) -> None:
        """Show the progress of a validation."""
        if batch == 1:
            self._validation_start = time.monotonic()
        total = -(-len(self._job.validation_rows) // self._job.validation_layout.batch_rows)
        self._progress.update(self._task, line=f"validating, batch {batch} of {total}")

    def validated(self, step: int, validations: dict[int, float]) -> None:
        """Print a validation's result, and leave its time out of the training speed."""
        self._validation_seconds = time.monotonic() - self._validation_start
        best = min(validations.values())
        mark = " (best so far)" if validations[step] <= best else ""
        console.print(f"step {step}: validation mean NLL {validations[step]:.5f}{mark}")
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
        mean_tokens = token_count(job.train_rows) / job.plan.steps_per_epoch
        left = (job.plan.total_steps - step) * mean_tokens / speed
        one = self._validation_seconds or token_count(job.validation_rows) / (3 * speed)
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
