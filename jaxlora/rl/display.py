"""What a person sees while a run learns from rewards: a progress line, and a line an evaluation."""

from __future__ import annotations

from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from jaxlora.rl.job import RLJob
from jaxlora.runtime.progress import console


class Display:
    """The live progress line of a run."""

    def __init__(self, job: RLJob, done: int):
        columns = (
            TextColumn("{task.description}", markup=False),  # run ids may look like markup
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TextColumn("{task.fields[line]}", markup=False),
        )
        self._progress = Progress(*columns, console=console)
        self._numbers = ""
        steps = job.plan.total_steps
        self._task = self._progress.add_task(job.config.run_id, total=steps, completed=done, line="compiling")

    def __enter__(self) -> Display:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def say(self, what: str) -> None:
        """What is being done, after the numbers of the last batch."""
        self._progress.update(self._task, line=" · ".join(filter(None, (self._numbers, what))))

    def show_batch(self, step: int, found: dict[str, Any]) -> None:
        """The numbers of a batch."""
        parts = [f"reward {found['reward/mean']:.3f}", f"constant {found['group/constant']:.0%}"]
        if found["ratio/max"] is not None:
            parts.append(f"KL {found['optim/kl_sample_train_v2']:.2g}, ratio up to {found['ratio/max']:.2f}")
        parts.append(f"{found['tokens_per_second']:,.0f} sampled tokens/s")
        self._numbers = " · ".join(parts)
        self._progress.update(self._task, completed=step, line=self._numbers)

    def evaluated(self, step: int, accuracy: float) -> None:
        """Print the result of an evaluation."""
        console.print(f"step {step}: {accuracy:.2%} of the held-out problems are right", markup=False)
