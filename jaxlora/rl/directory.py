"""The directory of a run that learns from rewards: the usual run directory plus its sampled answers.

<results>/<run_id>/
  manifest.json, metrics.jsonl, checkpoints/, tensorboard/, failure.json     as in `jaxlora.train`
  samples/step-000001.jsonl   a batch's answers with their rewards; eval-000010.jsonl: greedy ones
  selected/           the trained weights after the last step
  answers.html        the answers for a person to read, batch by batch
  accuracy.png        accuracy on held-out problems by step, and the mean reward
  summary.json        the outcome; its presence with status "completed" marks a finished run
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from jaxlora.rl.job import RLJob
from jaxlora.rl.learning import advantages_of
from jaxlora.rl.page import PAGE, write_page
from jaxlora.rl.problems import Problem, problems_hash
from jaxlora.rl.rewards import source_sha256
from jaxlora.rl.sampling import Episode, Group
from jaxlora.runtime import hosts
from jaxlora.runtime.files import sha256_of, write_json_atomic, write_jsonl_atomic
from jaxlora.runtime.records import metric_record, read_metrics, summary_record
from jaxlora.train.display import picture
from jaxlora.train.manifest import common_manifest
from jaxlora.train.run_directory import RunDirectory


class RLDirectory(RunDirectory):
    """An opened run directory; see `RunDirectory`."""

    @staticmethod
    def manifest_of(job: RLJob) -> dict[str, Any]:
        """The manifest; its `kind` distinguishes it from that of a supervised run."""
        rl, plan = job.config.rl, job.plan
        parts = {
            "train": (rl.problems, job.problems, job.prompts),
            "validation": (rl.eval_problems, job.eval_problems, job.eval_prompts),
        }
        return common_manifest(job) | {
            "kind": "rl",
            "loss": dataclasses.asdict(job.loss),
            "reward": {"name": rl.reward, "sha256": source_sha256(rl.reward)},
            "stop_token_ids": list(job.stop_ids),
            "schedule": {
                "total_steps": plan.total_steps,
                "warmup_steps": plan.warmup_steps,
                "validation_steps": list(plan.validation_steps),
            },
            "dataset": {
                name: {
                    "path": path,
                    "tokens_sha256": problems_hash(problems, prompts),
                    "rows": len(problems),
                    "row_ids": [problem.id for problem in problems],
                }
                for name, (path, problems, prompts) in parts.items()
            },
        }

    def sample_render(self) -> str:
        """The first prompt as the model sees it."""
        return str(self.job.tokenizer.decode(self.job.prompts[0]))

    # --- Records --------------------------------------------------------------------------------------------

    def batch_record(self, step: int, rate: float, fields: dict[str, Any]) -> dict[str, Any]:
        """The metrics record of one batch."""
        tokens = fields["sampled_tokens"] + fields["prompt_tokens"]
        return metric_record(
            **self._names(), step=step, split="train", learning_rate=rate, token_count=tokens, **fields
        )

    def evaluation_record(self, step: int, episodes: Sequence[Episode]) -> dict[str, Any]:
        """The metrics record of one evaluation."""
        graded = [one.graded for one in episodes if one.graded]
        return metric_record(
            **self._names(),
            step=step,
            split="validation",
            eval_metric=sum(one.correct for one in graded) / len(graded),
            token_count=sum(len(one.tokens) for one in episodes),
            **{
                "reward/mean": sum(one.reward for one in graded) / len(graded),
                "reward/well_formed": sum(one.well_formed for one in graded) / len(graded),
                "reward/failed": sum(one.failed is not None for one in graded),
                "episode/truncated": sum(one.truncated for one in episodes) / len(episodes),
            },
        )

    def write_samples(self, step: int, groups: Sequence[Group]) -> None:
        """Write a batch's answers, one per line."""
        records = [
            {"step": step, "sample": i, "advantage": float(advantage)} | _told(group.problem, one)
            for group in groups
            for i, (one, advantage) in enumerate(
                zip(group.episodes, advantages_of(group, self.job.config.rl), strict=True)
            )
        ]
        self._write(f"step-{step:06}", records)

    def write_answers(self, step: int, problems: Sequence[Problem], episodes: Sequence[Episode]) -> None:
        """Write the answers of an evaluation, one per line."""
        pairs = zip(problems, episodes, strict=True)
        self._write(f"eval-{step:06}", [{"step": step} | _told(problem, one) for problem, one in pairs])

    def _write(self, name: str, records: list[dict[str, Any]]) -> None:
        if hosts.is_main():
            self._check_ours()
            folder = self.path / "samples"
            folder.mkdir(exist_ok=True)
            write_jsonl_atomic(folder / f"{name}.jsonl", records)

    def clear_after(self, step: int) -> None:
        """Remove the answers of steps that will be repeated, and partially written files of a killed run."""
        if not hosts.is_main():
            return
        for file in (self.path / "samples").glob("*"):
            known = file.stem.partition("-")[2]
            if file.name.startswith(".") or (known.isdigit() and int(known) > step):
                file.unlink()

    # --- The end --------------------------------------------------------------------------------------------

    def finish(self, step: int, validations: dict[int, float], last: int) -> None:
        """Write the plot and `summary.json`, which marks the run as complete."""
        if not hosts.is_main():
            return
        self._check_ours()
        records = [record for record in read_metrics(self.path) if record["split"] == "train"]
        rewards = {record["step"]: record["reward/mean"] for record in records}
        self._draw("accuracy.png", partial(draw, accuracy=validations, rewards=rewards))
        name, value = ("accuracy", validations[step]) if step in validations else ("reward", rewards[step])
        self._end_curves({f"final/{name}": value}, step, last)
        write_page(self.path)
        pages = ("accuracy.png", PAGE)
        artifacts = ("manifest.json", "metrics.jsonl", "samples", "selected", "tensorboard", *pages)
        record = summary_record(
            **self._names(),
            checkpoint=f"step-{step}",
            dataset=self.job.config.rl.problems,
            primary_metric={"name": name, "value": value},
            artifact_paths={Path(name).stem: name for name in artifacts if (self.path / name).exists()},
            status="completed",
            token_count=sum(record["token_count"] for record in records),
            selected_step=step,
            evaluations=[{"step": s, "accuracy": found} for s, found in sorted(validations.items())],
            episodes=sum(record["episode/count"] for record in records),
            sampled_tokens=sum(record["sampled_tokens"] for record in records),
            updates=sum(record["optim/updates"] for record in records),
            bits_available=sum(record["bits/available"] for record in records),
            base_weights_sha256=self.base_weights_sha256,
            sha256={name: sha256_of(self.path / name) for name in self._hashed()},
        )
        write_json_atomic(self.path / "summary.json", record)


def _told(problem: Problem, episode: Episode) -> dict[str, Any]:
    graded = episode.graded
    assert graded is not None
    asked = next((m["content"] for m in reversed(problem.messages) if m.get("role") == "user"), "")
    return {
        "problem": problem.id,
        "question": asked,
        "answer": problem.answer,
        "text": episode.text.encode("utf-8", "replace").decode(),
        "reward": graded.reward,
        "correct": graded.correct,
        "well_formed": graded.well_formed,
        "failed": graded.failed,
        "tokens": len(episode.tokens),
        "truncated": episode.truncated,
        "logprob": round(sum(episode.logprobs), 4) if episode.logprobs else None,
    }


def draw(path: Path, accuracy: dict[int, float], rewards: dict[int, float], title: str) -> None:
    """Plot accuracy on held-out problems by step, over the mean reward of each batch, as PNG."""
    steps, batches = sorted(accuracy), sorted(rewards)
    with picture(path, title) as axes:
        axes.plot(batches, [rewards[s] for s in batches], color="#BBBBBB", label="mean reward")
        if steps:
            axes.plot(steps, [accuracy[s] for s in steps], "o-", color="#0072B2", label="held-out accuracy")
        axes.set(xlabel="step", ylabel="share of answers")
