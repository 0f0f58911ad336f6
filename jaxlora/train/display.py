"""What the user sees while a run trains: a progress line, announcements and the validation plot.

    with TrainingDisplay(job, first_step=1) as display:      # a `ProgressLine`, as for every kind of run
        with display.compiling("training step", batch["tokens"].shape):   # start, elapsed time, end
            state, metrics = train_step(...)
        display.show(step, loss, display.rate(tokens))

Without a terminal, timestamped lines replace the progress line: see `jaxlora.runtime.progress`.
"""

from __future__ import annotations

import io
import time
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import jax
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn
from rich.text import Text

from jaxlora.models.families import count_matrix_parameters
from jaxlora.runtime.devices import memory_in_use, peak_flops
from jaxlora.runtime.files import write_bytes_atomic
from jaxlora.runtime.progress import Heartbeat, console, say
from jaxlora.train.job import Job, Prepared, token_count

WINDOW = 50  # steps over which speed is averaged


class ProgressLine:
    """The live progress line of a run of any kind."""

    def __init__(self, job: Prepared, total_steps: int, done: int):
        columns = (
            TextColumn("{task.description}", markup=False),  # run ids may look like markup
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            _Line(),
        )
        self._progress = Progress(*columns, console=console)
        self._heartbeat = Heartbeat()
        self._total = total_steps
        self._task = self._progress.add_task(
            job.config.run_id, total=total_steps, completed=done, line="", since=None
        )

    def __enter__(self) -> Self:
        if console.is_terminal:
            self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        if console.is_terminal:
            self._progress.stop()

    def put(self, line: str, step: int | None = None) -> None:
        """Show the current activity and finished steps; without a terminal, print a line when one is due."""
        self._progress.update(self._task, completed=step, line=line)
        if not console.is_terminal and (self._heartbeat.due() or step == self._total):
            say(line if step is None else f"step {step:,} of {self._total:,} · {line}")


class TrainingDisplay(ProgressLine):
    """The progress line of a run that trains on rows, and the speeds recorded in its metrics."""

    def __init__(self, job: Job, first_step: int):
        super().__init__(job, job.plan.total_steps, first_step - 1)
        self._job = job
        self._shapes: set[tuple[str, tuple[int, ...]]] = set()
        self._times: deque[tuple[float, int]] = deque(maxlen=WINDOW)
        # 2N forward, 2N for the gradient of activations; in full fine-tuning, 2N for that of the weights.
        self._flops_per_token = (6 if job.spec.full else 4) * count_matrix_parameters(job.spec.config)
        self._device = jax.local_devices()[0]
        peak = peak_flops(self._device)
        self._peak = peak * job.mesh.size if peak else None
        # Counted once: the remaining time is computed at every step, and there may be a million rows.
        self._step_tokens = token_count(job.train_rows) / job.plan.steps_per_epoch
        self._validation_tokens = token_count(job.validation_rows)
        self._validation_seconds: float | None = None
        self._validation_start = 0.0

    @contextmanager
    def compiling(self, what: str, shape: tuple[int, ...]) -> Iterator[None]:
        """Announce the compilation of a program on its first run, and how long it took.

        Compiling takes seconds to minutes; on a terminal, the progress line counts them. A call returns once
        its program is compiled, without waiting for the device.
        """
        if (what, shape) in self._shapes:
            yield
            return
        self._shapes.add((what, shape))
        title = f"the {what} for buffers of {shape[0]} x {shape[1]} x {shape[2]}"
        start = time.monotonic()
        say(f"compiling {title}")
        line = self._progress.tasks[0].fields["line"]
        self._progress.update(self._task, line=f"compiling the {what}", since=start)
        try:
            yield
        finally:
            self._progress.update(self._task, line=line, since=None)
        say(f"compiled {title} in {time.monotonic() - start:.1f} s")

    def rate(self, tokens: int) -> dict[str, float | None]:
        """Seconds per step, tokens per second over the last steps, model FLOPs utilisation, peak memory.

        Utilisation counts 4N FLOPs per real token for LoRA and 6N for full fine-tuning, relative to the
        devices' dense bf16 peak; null if the peak is unknown.

        Args:
          tokens: tokens of the step.
        """
        now = time.monotonic()
        seconds = now - self._times[-1][0] if self._times else None
        self._times.append((now, tokens))
        speed = self._speed()
        utilisation = speed * self._flops_per_token / self._peak if speed and self._peak else None
        return {
            "seconds": seconds,
            "tokens_per_second": speed,
            "model_flops_utilisation": utilisation,
            "peak_memory_bytes": memory_in_use(self._device),
        }

    def show(self, step: int, loss: float, speed: dict[str, float | None]) -> None:
        """Update the progress line with a step's loss and the speed."""
        parts = [f"loss {loss:.4f}"]
        if speed["tokens_per_second"]:
            parts.append(f"{speed['tokens_per_second']:,.0f} tokens/s")
        if speed["model_flops_utilisation"]:
            parts.append(f"{speed['model_flops_utilisation']:.1%} MFU")
        parts.append(f"ETA {self._remaining(step)}")
        self.put(" · ".join(parts), step)

    def validating(self, batch: int) -> None:
        """Show the progress of a validation."""
        if batch == 1:
            self._validation_start = time.monotonic()
        total = -(-len(self._job.validation_rows) // self._job.validation_layout.batch_rows)
        self.put(f"validating, batch {batch} of {total}")

    def validated(self, step: int, nll: Mapping[int, float]) -> None:
        """Print the result of the latest of all validations so far; exclude its time from the speed."""
        self._validation_seconds = time.monotonic() - self._validation_start
        mark = " (best so far)" if nll[step] <= min(nll.values()) else ""
        say(f"step {step}: validation mean NLL {nll[step]:.5f}{mark}")
        self._times.clear()

    def _speed(self) -> float | None:
        """Tokens per second over the last steps."""
        span = self._times[-1][0] - self._times[0][0]
        return sum(n for _, n in list(self._times)[1:]) / span if span > 0 else None

    def _remaining(self, step: int) -> str:
        """Remaining time, including validations; until one is timed, it counts as a third of a pass."""
        job = self._job
        if not (speed := self._speed()):
            return "-"
        left = (job.plan.total_steps - step) * self._step_tokens / speed
        one = self._validation_seconds or self._validation_tokens / (3 * speed)
        left += one * sum(s > step for s in job.plan.validation_steps)
        minutes, seconds = divmod(int(left), 60)
        hours, minutes = divmod(minutes, 60)
        return f"{hours}:{minutes:02}:{seconds:02}"


class _Line(ProgressColumn):
    """The text of the progress line, and the seconds since the current activity began."""

    def render(self, task: Task) -> Text:
        since = task.fields["since"]
        return Text(task.fields["line"] + (f", {time.monotonic() - since:.0f} s" if since else ""))


def draw_validation(path: Path, validations: dict[int, float], selected: int, title: str) -> None:
    """Plot validation mean NLL by step as PNG, with the selected checkpoint marked."""
    steps, label = sorted(validations), f"selected: {selected}"
    with picture(path, title) as axes:
        axes.plot(steps, [validations[s] for s in steps], "o-", color="#0072B2", label="validation")
        axes.plot([selected], [validations[selected]], "s", color="#D55E00", markersize=9, label=label)
        axes.set(xlabel="step", ylabel="validation mean NLL (nats per answer token)")


@contextmanager
def picture(path: Path, title: str) -> Iterator[Any]:
    """Yield the axes of a run's plot, which is written as PNG when the context ends."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes = figure.add_subplot()
    yield axes
    axes.set_title(title, parse_math=False, usetex=False)  # `$`, `_` and `^` in a run's name are not math
    axes.legend()
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=150, metadata={"Software": None})
    write_bytes_atomic(path, content.getvalue())
