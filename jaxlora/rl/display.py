"""Terminal output of a run that learns from rewards: a progress line, and one line per evaluation."""

from __future__ import annotations

from typing import Any

from jaxlora.rl.job import RLJob
from jaxlora.runtime.progress import say
from jaxlora.train.display import ProgressLine


class Display(ProgressLine):
    """The progress line of a run that learns from rewards."""

    def __init__(self, job: RLJob, done: int):
        super().__init__(job, job.plan.total_steps, done)
        self._numbers = ""
        self._reasons: set[str] = set()  # grader failures already reported
        self.put("compiling")

    def say(self, what: str) -> None:
        """Show the current activity after the numbers of the last batch."""
        self.put(" · ".join(filter(None, (self._numbers, what))))

    def show_batch(self, step: int, found: dict[str, Any]) -> None:
        """Show the numbers of a batch."""
        parts = [f"reward {found['reward/mean']:.3f}", f"constant {found['group/constant']:.0%}"]
        if found["ratio/max"] is not None:
            parts.append(f"KL {found['optim/kl_sample_train_v2']:.2g}, ratio up to {found['ratio/max']:.2f}")
        parts.append(f"{found['tokens_per_second']:,.0f} sampled tokens/s")
        self._numbers = " · ".join(parts)
        self.put(self._numbers, step)

    def failed(self, step: int, failures: dict[str, int], answers: int) -> None:
        """Report, once for each reason, that a grader returned no value."""
        for reason in failures.keys() - self._reasons:
            say(
                f"step {step}: the grader gave no value for {failures[reason]:,} of {answers:,} answers"
                f" ({reason}); they count as 0"
            )
        self._reasons |= failures.keys()

    def evaluated(self, step: int, accuracy: float) -> None:
        """Print the result of an evaluation."""
        say(f"step {step}: {accuracy:.2%} of the held-out problems are right")
