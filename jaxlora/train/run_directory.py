"""The run directory: what is written where, and when a directory may be resumed.

<results>/<run_id>/
  manifest.json       what was run: code, versions, device, configuration, data hashes, row ids, plan
  metrics.jsonl       one record a step and a validation
  summary.json        the outcome; its presence with status "completed" marks a finished run
  sample_render.txt   the first training row as the model sees it
  checkpoints/        adapter, optimizer state and position, for resuming
  selected/           the adapter with the lowest validation NLL, in PEFT format
  tensorboard/        the same curves for TensorBoard
  validation.png      validation NLL by step
  failure.json        only if it failed: stage, step and trace

Of several processes, the main one writes; `checkpoints/` is written by all.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

from jaxlora.checkpoints.adapters import read_adapter
from jaxlora.checkpoints.base import load_base, save_model
from jaxlora.checkpoints.peft import export_adapter
from jaxlora.models.decoder import Tree
from jaxlora.runtime import hosts
from jaxlora.runtime.errors import MachineError, UserError
from jaxlora.runtime.files import (
    append_jsonl,
    cut_jsonl,
    is_disk_full,
    metric_record,
    read_json,
    read_jsonl,
    summary_record,
    write_json_atomic,
    write_text_atomic,
)
from jaxlora.runtime.progress import console
from jaxlora.runtime.redaction import without_secrets
from jaxlora.sharding import place_trained
from jaxlora.train.board import Board, write_outcome
from jaxlora.train.display import draw_validation
from jaxlora.train.job import Job, token_count
from jaxlora.train.manifest import differences, identity, make_manifest, rounding_differences


class RunDirectory:
    """An opened run directory; the main process holds its lock and is the only one that writes."""

    def __init__(self, job: Job, manifest: dict[str, Any]):
        self.path, self.job = job.config.run_dir, job
        self.identity = identity(manifest)
        self._metrics = self.path / "metrics.jsonl"
        self._board: Board | None = None

    @classmethod
    @contextmanager
    def open(cls, job: Job) -> Iterator[RunDirectory]:
        """Make the directory, or take up an unfinished run of the same configuration.

        Raises:
          UserError: the run is finished, belongs to another configuration, or is being written now.
        """
        hosts.check_shared(job.config.results_dir)
        manifest = make_manifest(job)
        run = cls(job, manifest)
        hosts.check_same(run.identity | {key: manifest[key] for key in ("config", "packages")}, str(run.path))
        if not hosts.is_main():
            hosts.barrier("run directory")
            yield run
            return
        run.path.parent.mkdir(parents=True, exist_ok=True)
        with _lock(run.path.with_name(f".{run.path.name}.lock"), run.path):
            _take_over(run.path, manifest, job.config.overwrite)
            sample = str(job.tokenizer.decode(job.train_rows[0].tokens))
            write_text_atomic(run.path / "sample_render.txt", sample)
            hosts.barrier("run directory")
            try:
                yield run
            finally:
                if run._board is not None:
                    run._board.close()

    # --- Metrics --------------------------------------------------------------------------------------------

    def start_records(self, size: int) -> None:
        """Cut the metrics back to the first `size` bytes, and write the curves anew from what is left."""
        if not hosts.is_main():
            return
        cut_jsonl(self._metrics, size)
        if self._board is not None:
            self._board.close()
        shutil.rmtree(self.path / "tensorboard", ignore_errors=True)
        self._board = Board(self.path / "tensorboard", self.job.config)
        for record in read_jsonl(self._metrics):
            self._board.write(record)

    def record(self, record: dict[str, Any]) -> None:
        """Append one metrics record, and add it to the curves."""
        if self._board is not None:
            append_jsonl(self._metrics, record)
            self._board.write(record)

    def progress(self, step: int, validations: dict[int, float]) -> dict[str, Any]:
        """Where a run stands, for its checkpoint; the metrics up to here are on the disk."""
        size = 0
        if hosts.is_main():
            with self._metrics.open("rb") as file:
                os.fsync(file.fileno())
                size = file.seek(0, os.SEEK_END)
        return {"step": step, "validations": sorted(validations.items()), "metrics_bytes": size}

    def unusable(self, progress: dict[str, Any]) -> str | None:
        """Why a checkpoint with this progress cannot be resumed from, or None."""
        size = self._metrics.stat().st_size if self._metrics.is_file() else 0
        needed = progress["metrics_bytes"]
        return f"metrics.jsonl has {size} bytes, it was saved after {needed}" if size < needed else None

    def step_record(
        self, step: int, values: dict[str, float], tokens: int, rate: float, speed: dict[str, float | None]
    ) -> dict[str, Any]:
        """The metrics record of one training step. `token_count` is the step's, in shifted tokens."""
        return metric_record(
            **self._names(),
            step=step,
            split="train",
            loss=values["nll"] / values["weight"],
            learning_rate=rate,
            token_count=tokens,
            loss_tokens=int(values["weight"]),
            grad_norm=values["grad_norm"],
            update_norm=values["update_norm"],
            **speed,
        )

    def validation_record(self, step: int, mean_nll: float) -> dict[str, Any]:
        """The metrics record of one validation."""
        return metric_record(
            **self._names(),
            checkpoint=f"step-{step}",
            step=step,
            split="validation",
            loss=mean_nll,
            token_count=token_count(self.job.validation_rows),
        )

    def _names(self) -> dict[str, Any]:
        config = self.job.config
        return {"run_id": config.run_id, "condition": config.condition, "seed": config.seed}

    # --- The end --------------------------------------------------------------------------------------------

    def export_selected(self, trained: Tree, step: int) -> None:
        """Write what the selected step trained: an adapter as a PEFT folder, all weights as a Hugging Face
        directory in the dtype that the model computes in. Called on every process."""
        folder, job = self.path / "selected", self.job
        if hosts.is_main():
            shutil.rmtree(folder, ignore_errors=True)
        hosts.barrier("selected folder")
        if job.spec.full:
            _, weights = job.spec.computing(trained, {})
            assert (
                job.base.folder is not None
            )  # `prepare` refuses to train a base that is only a shape in full
            save_model(folder, job.spec, weights, job.base.folder, job.config.model.tokenizer)
            return
        extra = {"run_id": job.config.run_id, "step": step}
        export_adapter(folder, job.spec, trained, job.config.model.path, seed=job.config.seed, extra=extra)

    def finish(self, step: int, validations: dict[int, float]) -> None:
        """Write the picture and `summary.json`: the run is complete."""
        if not hosts.is_main():
            return
        draw_validation(self.path / "validation.png", validations, step, self.job.config.run_id)
        if self._board is not None:  # TensorBoard leaves a file for good once a newer one is there
            self._board.close()
            self._board = None
        write_outcome(self.path / "tensorboard", {"final/validation_nll": validations[step]}, step)
        plan, job = self.job.plan, self.job
        validation_tokens = token_count(job.validation_rows) * len(plan.validation_steps)
        train_tokens = token_count(job.train_rows) * job.config.train.epochs
        names = (
            "manifest.json",
            "metrics.jsonl",
            "sample_render.txt",
            "selected",
            "tensorboard",
            "validation.png",
        )
        record = summary_record(
            **self._names(),
            checkpoint=f"step-{step}",
            dataset=job.config.data.train_path,
            primary_metric={"name": "validation_mean_nll", "value": validations[step]},
            artifact_paths={Path(name).stem: name for name in names},
            status="completed",
            token_count=train_tokens + validation_tokens,
            train_token_count=train_tokens,
            validation_token_count=validation_tokens,
            validations=[{"step": s, "mean_nll": nll} for s, nll in sorted(validations.items())],
            selected_step=step,
        )
        write_json_atomic(self.path / "summary.json", record)

    def write_failure(self, stage: str, step: int, error: BaseException, trace: str) -> None:
        """Write `failure.json`; on a full disk, say that it could not be written."""
        if not hosts.is_main():
            return
        record = self._names() | {
            "stage": stage,
            "step": step,
            "error": without_secrets(f"{type(error).__name__}: {error}"),
            "trace": without_secrets(trace),
        }
        try:
            write_json_atomic(self.path / "failure.json", record)
        except OSError as second:
            if not is_disk_full(second):
                raise
            console.print("failure.json could not be written either: the disk is full")


# --- Whose directory it is ----------------------------------------------------------------------------------


@contextmanager
def _lock(file: Path, run: Path) -> Iterator[IO[str]]:
    """An exclusive lock that the system releases when this process ends, however it ends."""
    with file.open("a+") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            handle.seek(0)
            owner = handle.read().strip() or "another process"
            text = f"{run}: {owner} is writing this run; wait for it or stop it"
            if f" on {socket.gethostname()} " in owner:
                raise UserError(text) from None
            # A host that has died may hold its lock on a shared folder a while longer: worth another try.
            raise MachineError(text) from None
        handle.truncate(0)
        started = time.strftime("%Y-%m-%d %H:%M:%S")
        handle.write(f"process {os.getpid()} on {socket.gethostname()} (since {started})\n")
        handle.flush()
        yield handle


def read_selected(job: Job) -> Tree:
    """What a finished run selected, as its training held it, but rounded to what was written."""
    folder = job.config.run_dir / "selected"
    if not job.spec.full:
        return place_trained(job.mesh, job.spec, read_adapter(folder, job.spec.config).tree)
    return load_base(folder, replace(job.spec, dtype="float32", full=False), job.mesh)


def is_finished(path: Path) -> bool:
    """Whether this run directory holds a complete run."""
    summary = path / "summary.json"
    return summary.is_file() and read_json(summary).get("status") == "completed"


def _take_over(path: Path, manifest: dict[str, Any], overwrite: bool) -> None:
    """Make the directory ours: new, cleared, or with what it held of the same run. The lock is held."""
    _clear(path)
    if path.exists() and any(path.iterdir()):
        if not (path / "manifest.json").is_file():
            raise UserError(f"{path}: exists and is not a run; choose another results_dir or prefix")
        old = read_json(path / "manifest.json")
        different = differences(identity(old), identity(manifest))
        # A run that was itself started with overwrite, and has been stopped, is resumed by the same command.
        same_command = old.get("config", {}).get("overwrite") and not different and not is_finished(path)
        if overwrite and not same_command:
            path.rename(_deleted(path))
            _clear(path)
        elif is_finished(path):
            raise UserError(
                f"{path}: this run is finished; --config.overwrite=true deletes it and starts again"
            )
        elif different:
            raise UserError(
                f"{path}: an unfinished run of another configuration; it differs in {'; '.join(different)}."
                " Change the prefix, or give --config.overwrite=true to delete it"
            )
        else:
            manifest["resumed_with"] = _resumed_with(old, manifest)
    path.mkdir(exist_ok=True)
    (path / "failure.json").unlink(missing_ok=True)
    write_json_atomic(path / "manifest.json", manifest)
    if overwrite:
        # A copy of the run elsewhere, such as a bucket's, keeps its files until they are written again: the
        # old summary must not stand there beside the new run.
        write_json_atomic(path / "summary.json", {"status": "unfinished"})


def _resumed_with(old: dict[str, Any], new: dict[str, Any]) -> list[list[str]]:
    """Every change of device, layout or versions that this run has gone through."""
    history = old.get("resumed_with", [])
    if not (changed := rounding_differences(old, new)):
        return history
    console.print(
        f"resuming with changes: {'; '.join(changed)}. The result is the same up to rounding, not to the bit",
        markup=False,
    )
    return [*history, changed]


def _deleted(path: Path) -> Path:
    return path.with_name(f".{path.name}.deleted")


def _clear(path: Path) -> None:
    """Remove what a process that was killed left half written or half deleted."""
    if _deleted(path).exists():
        shutil.rmtree(_deleted(path))
    for name in ("manifest.json", "sample_render.txt", "summary.json", "failure.json", "selected"):
        for leftover in path.glob(f".{name}.*"):
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
