"""The run directory: what is written where, and when it may be resumed.

<results>/<run_id>/
  manifest.json       what was run: code, versions, device, configuration, data hashes, row ids, plan
  metrics.jsonl       one record per step and per validation
  summary.json        the outcome; its presence with status "completed" marks a finished run
  sample_render.txt   the first training row as the model sees it
  checkpoints/        trained weights, optimizer state and position, for resuming
  selected/           the weights with the lowest validation NLL: an adapter in PEFT format, or a full model
  tensorboard/        the same curves for TensorBoard
  samples.jsonl       only with train.samples: answers to validation prompts, at each validation
  validation.png      validation NLL by step
  failure.json        only if it failed: stage, step and trace

With several processes, only the main one writes, except `checkpoints/`, which all write.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import socket
import stat
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Self

from jaxlora.checkpoints.adapters import read_adapter
from jaxlora.checkpoints.base import load_base, save_model
from jaxlora.checkpoints.export import check_selected
from jaxlora.checkpoints.peft import export_adapter
from jaxlora.models.decoder import Tree
from jaxlora.runtime import hosts
from jaxlora.runtime.errors import MachineError, UserError, one_line
from jaxlora.runtime.files import (
    append_jsonl,
    cut_jsonl,
    is_disk_full,
    read_numbered_jsonl,
    sha256_of,
    write_json_atomic,
    write_text_atomic,
)
from jaxlora.runtime.folders import Taken
from jaxlora.runtime.progress import console
from jaxlora.runtime.records import (
    metric_record,
    progress_problem,
    read_manifest,
    read_metrics,
    read_summary,
    summary_record,
)
from jaxlora.runtime.text import harmless, without_secrets
from jaxlora.sharding import place_trained
from jaxlora.train.board import Board, curves, write_outcome
from jaxlora.train.display import draw_validation
from jaxlora.train.job import Job, Prepared, token_count, trained_tokens
from jaxlora.train.manifest import (
    differences,
    identity,
    make_manifest,
    rounding_differences,
    same_but_for_command,
)
from jaxlora.train.tracking import Tracker

SAMPLES = "samples.jsonl"
_LONGEST_NAME = 240  # bytes of a run's name: file systems allow 255, and the name of its lock is longer


class RunDirectory:
    """An opened run directory; the main process holds its lock and is the only one that writes."""

    job: Any  # a `Job`, or the `Prepared` of another kind of run

    def __init__(self, job: Prepared, manifest: dict[str, Any]):
        self.path, self.job = job.config.run_dir, job
        self.manifest, self.identity = manifest, identity(manifest)
        self._metrics = self.path / "metrics.jsonl"
        self._size = 0  # bytes of the metrics as last written by this process
        self._board: Board | None = None
        self._tracker: Tracker | None = None
        self._begun_on: str | None = None  # the hash of the base's weights, from a checkpoint

    @classmethod
    @contextmanager
    def open(cls, job: Any) -> Iterator[Self]:
        """Create the directory, or resume an unfinished run of the same configuration.

        Raises:
          UserError: the run is finished, belongs to another configuration, or is being written by another
            process; or its name is too long for file systems.
        """
        name = len(os.fsencode(job.config.run_id))
        if name > _LONGEST_NAME:
            raise UserError(
                f"config.prefix: the run's name takes {name} bytes; give one of at most {_LONGEST_NAME}"
            )
        hosts.check_shared(job.config.results_dir)
        manifest = cls.manifest_of(job)
        run = cls(job, manifest)
        hosts.check_same(run.identity | {key: manifest[key] for key in ("config", "packages")}, str(run.path))
        if not hosts.is_main():
            hosts.barrier("run directory")
            yield run
            return
        run.path.parent.mkdir(parents=True, exist_ok=True)
        place = Path(os.path.realpath(run.path))  # the run's folder may be a symbolic link
        metrics = place / "metrics.jsonl"
        with _lock(place.with_name(f".{place.name}.lock"), run.path), ExitStack() as stack:
            # Deleting the lock file does not admit a second writer: the metrics file is locked too.
            if metrics.exists():
                with _exclusive(metrics, run.path):
                    pass
            _take_over(place, manifest, job.config.overwrite)
            stack.enter_context(_exclusive(metrics, run.path))
            write_text_atomic(run.path / "sample_render.txt", run.sample_render())
            hosts.barrier("run directory")
            try:
                yield run
            finally:
                for writer in (run._board, run._tracker):
                    if writer is not None:
                        writer.close()

    @staticmethod
    def manifest_of(job: Any) -> dict[str, Any]:
        """The manifest of a run of this kind that is now started or resumed."""
        return make_manifest(job)

    def sample_render(self) -> str:
        """The first training row as the model sees it."""
        return str(self.job.tokenizer.decode(self.job.train_rows[0].tokens))

    # --- Metrics --------------------------------------------------------------------------------------------

    def start_records(self, size: int, validations: Collection[int] = ()) -> None:
        """Truncate the metrics to the first `size` bytes and the samples to those of these validations, and
        rewrite the curves from the rest."""
        if not hosts.is_main():
            return
        cut_jsonl(self._metrics, size)
        self._size = size
        if self._board is not None:
            self._board.close()
        shutil.rmtree(self.path / "tensorboard", ignore_errors=True)
        self._board = Board(self.path / "tensorboard", self.job.config)
        for record in read_metrics(self.path):
            self._board.write(record)
        self._keep_samples(validations)
        if self.job.config.tracking is not None and self._tracker is None:
            self._tracker = Tracker(self.job.config)

    def _keep_samples(self, validations: Collection[int]) -> None:
        """Drop the samples of validations that have yet to be repeated."""
        file = self.path / SAMPLES
        if not file.is_file():
            return
        read = (record for _, record in read_numbered_jsonl(file))
        records = [record for record in read if record.get("step") in validations]
        file.unlink()
        self.record_samples(records)

    def record_samples(self, records: list[dict[str, Any]]) -> None:
        """Append the sample answers of a validation."""
        if self._board is None:
            return
        for number, record in enumerate(records):
            append_jsonl(self.path / SAMPLES, record)
            self._board.write_sample(record, number % max(1, self.job.config.train.samples))

    def record(self, record: dict[str, Any]) -> None:
        """Append one metrics record and add it to the curves.

        Raises:
          UserError: the folder is gone, or something else wrote the metrics.
        """
        if self._board is not None:
            self._check_ours()
            append_jsonl(self._metrics, record)
            self._size = self._metrics.stat().st_size
            self._board.write(record)
            if self._tracker is not None:
                self._tracker.write(curves(record), record["step"])

    def _check_ours(self) -> None:
        """Refuse to recreate a folder that was deleted during the run: its manifest would be missing."""
        if not self._metrics.is_file():
            raise UserError(
                f"{self.path}: was deleted or moved during training, and is not recreated. Put it"
                " back, or remove what is left of it, and run the same command"
            )
        if (size := self._metrics.stat().st_size) != self._size:
            raise UserError(
                f"{self._metrics}: has {size} bytes, but this run wrote {self._size}: another process is"
                " writing to it. Stop that one, and run the same command to resume from the last checkpoint"
            )

    def progress(self, step: int, validations: dict[int, float]) -> dict[str, Any]:
        """The run's position, for its checkpoint; the metrics up to here are synced to disk."""
        size, sha256 = 0, None
        if hosts.is_main():
            with self._metrics.open("rb") as file:
                os.fsync(file.fileno())
                size = file.seek(0, os.SEEK_END)
            sha256 = sha256_of(self._metrics, size)
        pairs = [list(pair) for pair in sorted(validations.items())]
        return {
            "step": step,
            "validations": pairs,
            "metrics_bytes": size,
            "metrics_sha256": sha256,
            "base_weights_sha256": self.base_weights_sha256,
        }

    @property
    def base_weights_sha256(self) -> str | None:
        """Hash of the base that the run began with; in full fine-tuning it is loaded only at the start."""
        return self._begun_on or self.job.base.weights_sha256

    def goes_on_from(self, progress: dict[str, Any]) -> None:
        """Remember what a checkpoint recorded about the base."""
        self._begun_on = progress.get("base_weights_sha256")

    def check_base(self) -> None:
        """Compare the base loaded now, if any, with the recorded one.

        Raises:
          UserError: it is not the one that the run began with.
        """
        now = self.job.base.weights_sha256
        if self._begun_on and now and now != self._begun_on:
            raise UserError(
                f"{self.job.config.model.path}: its weights are not those that this run started with. Restore"
                " those, or give --config.overwrite=true to start again with these"
            )

    def unusable(self, progress: dict[str, Any]) -> str | None:
        """Why a checkpoint with this progress cannot be resumed from, or None."""
        if problem := progress_problem(progress):
            return problem
        size = self._metrics.stat().st_size if self._metrics.is_file() else 0
        needed, sha256 = progress["metrics_bytes"], progress.get("metrics_sha256")
        if size < needed:
            return f"metrics.jsonl has {size} bytes, it was saved after {needed}"
        if sha256 is not None and sha256_of(self._metrics, needed) != sha256:
            return (
                f"the first {needed} bytes of metrics.jsonl are not what was written: their SHA-256 differs"
            )
        return None

    def step_record(
        self, step: int, values: dict[str, float], tokens: int, rate: float, speed: dict[str, float | None]
    ) -> dict[str, Any]:
        """The metrics record of one training step. Its `token_count` is the step's shifted tokens."""
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
        """Write the weights of the selected step: an adapter as a PEFT folder, all weights as a Hugging Face
        directory in the dtype of computation. Called on every process."""
        folder, job = self.path / "selected", self.job
        if hosts.is_main():
            self._check_ours()
            shutil.rmtree(folder, ignore_errors=True)
        hosts.barrier("selected folder")
        if job.spec.full:
            _, weights = job.spec.computing(trained, {})
            assert (
                job.base.folder is not None
            )  # `prepare` refuses full fine-tuning of a base that is only a shape
            save_model(folder, job.spec, weights, job.base.folder, job.base.tokenizer_folder())
            return
        export_adapter(
            folder,
            job.spec,
            trained,
            job.config.model.path,
            seed=job.config.seed,
            extra={"run_id": job.config.run_id, "step": step},
            tokenizer=job.base.tokenizer_folder(),
            base_fingerprint=job.base.fingerprint(),
        )

    def finish(self, step: int, validations: dict[int, float], last: int) -> None:
        """Write the plot and `summary.json`, which completes the run.

        Args:
          step: the selected step.
          last: the last step of the run.
        """
        if not hosts.is_main():
            return
        self._check_ours()
        self._draw("validation.png", partial(draw_validation, validations=validations, selected=step))
        self._end_curves({"final/validation_nll": validations[step]}, step, last)
        job = self.job
        validation_tokens = token_count(job.validation_rows) * len(validations)
        train_tokens = trained_tokens(job, last)
        names = (
            "manifest.json",
            "metrics.jsonl",
            "sample_render.txt",
            SAMPLES,
            "selected",
            "tensorboard",
            "validation.png",
        )
        record = summary_record(
            **self._names(),
            checkpoint=f"step-{step}",
            dataset=job.config.data.train_path,
            primary_metric={"name": "validation_mean_nll", "value": validations[step]},
            artifact_paths={Path(name).stem: name for name in names if (self.path / name).exists()},
            status="completed",
            token_count=train_tokens + validation_tokens,
            train_token_count=train_tokens,
            validation_token_count=validation_tokens,
            validations=[{"step": s, "mean_nll": nll} for s, nll in sorted(validations.items())],
            selected_step=step,
            **_end(job, last),
            base_weights_sha256=self.base_weights_sha256,
            sha256={name: sha256_of(self.path / name) for name in self._hashed()},
        )
        write_json_atomic(self.path / "summary.json", record)

    def _draw(self, name: str, draw: Callable[..., None]) -> None:
        """Draw a plot of the run; a failure to draw it never fails the run."""
        try:
            draw(self.path / name, title=self.job.config.run_id)
        except Exception as error:
            console.print(f"{name} could not be drawn: {one_line(error)}", markup=False)

    def _end_curves(self, outcome: dict[str, float], step: int, last: int) -> None:
        """Add the outcome at the selected step to the curves, which end at the last step."""
        if self._board is not None:  # TensorBoard never returns to a file once there is a newer one
            self._board.close()
            self._board = None
        write_outcome(self.path / "tensorboard", outcome, step)
        if self._tracker is not None:
            self._tracker.write(outcome, last)

    def _hashed(self) -> list[str]:
        """The files hashed in `summary.json`: everything that is read after the run has ended."""
        selected = (path for path in (self.path / "selected").rglob("*") if path.is_file())
        names = sorted(path.relative_to(self.path).as_posix() for path in selected)
        return ["metrics.jsonl", "manifest.json", *names]

    def write_failure(self, stage: str, step: int, error: BaseException, trace: str) -> None:
        """Write `failure.json`; if the disk is full, report that it could not be written."""
        if not hosts.is_main() or not (self.path / "manifest.json").is_file():  # deleted meanwhile
            return
        record = self._names() | {
            "stage": stage,
            "step": step,
            "error": harmless(without_secrets(f"{type(error).__name__}: {error}")),
            "trace": harmless(without_secrets(trace)),
        }
        try:
            write_json_atomic(self.path / "failure.json", record)
        except OSError as second:
            if not is_disk_full(second):
                raise
            console.print("failure.json could not be written either: the disk is full")


def _end(job: Job, last: int) -> dict[str, Any]:
    """Why a run ended before its last epoch; empty if it did not."""
    if last < job.plan.total_steps:
        patience = job.config.train.early_stopping
        reason = f"early stopping: no lower validation NLL in the last {patience} validations"
    elif job.config.train.max_steps == last:
        reason = "train.max_steps"
    else:
        return {}
    return {"last_step": last, "ended_by": reason}


# --- Ownership of the directory -----------------------------------------------------------------------------


@contextmanager
def _lock(file: Path, run: Path) -> Iterator[None]:
    """An exclusive lock, released by the operating system when this process ends for any reason.

    Raises:
      Taken: another process on this host holds it.
      UserError: the lock's path is a symbolic link, whose target is left unchanged.
      MachineError: a process on another host holds it.
    """
    with _exclusive(file, run) as handle:
        if os.fstat(handle).st_nlink > 1:
            raise UserError(f"{file}: is a hard link to another file; remove it")
        os.ftruncate(handle, 0)
        started = time.strftime("%Y-%m-%d %H:%M:%S")
        os.write(handle, f"process {os.getpid()} on {socket.gethostname()} (since {started})\n".encode())
        yield


@contextmanager
def _exclusive(file: Path, run: Path) -> Iterator[int]:
    """A file open in one process at a time, created if missing; raises like `_lock`."""
    while True:
        try:
            handle = os.open(
                file, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666
            )
        except OSError as error:
            if error.errno not in (errno.ELOOP, errno.ENXIO, errno.EISDIR):
                raise
            raise UserError(f"{file}: must be a plain file, not a link or a folder") from None
        try:
            opened = os.fstat(handle)
            if not stat.S_ISREG(opened.st_mode):
                raise UserError(f"{file}: must be a plain file, not a device")
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise _is_written(run, os.pread(handle, 200, 0)) from None
            if file.exists() and os.path.samestat(file.stat(), opened):  # not deleted meanwhile
                yield handle
                return
        finally:
            os.close(handle)


def _is_written(run: Path, note: bytes) -> Exception:
    """The error for the second writer of a run."""
    owner = note.decode("utf-8", "replace").strip()
    if not owner.startswith("process "):  # the lock file was deleted
        owner = "another process"
    text = f"{run}: {owner} is writing this run; wait for it or stop it"
    if owner == "another process" or f" on {socket.gethostname()} " in owner:
        return Taken(text)
    # A dead host may hold its lock on a shared folder for a while: worth a retry.
    return MachineError(text)


def read_selected(job: Job) -> Tree:
    """The selected weights of a finished run, in the form held in training, as rounded on writing.

    Raises:
      UserError: its files are not those that the run wrote.
    """
    check_selected(job.config.run_dir)
    folder = job.config.run_dir / "selected"
    if not job.spec.full:
        return place_trained(job.mesh, job.spec, read_adapter(folder, job.spec.config).tree)
    return load_base(folder, replace(job.spec, dtype="float32", full=False), job.mesh)


def is_finished(path: Path) -> bool:
    """Whether this run directory holds a complete run."""
    return (path / "summary.json").is_file() and read_summary(path).get("status") == "completed"


def _take_over(path: Path, manifest: dict[str, Any], overwrite: bool) -> None:
    """Claim the directory: new, cleared, or with its contents of the same run. The lock is held."""
    _clear(path)
    if path.exists() and any(path.iterdir()):
        if not (path / "manifest.json").is_file():
            raise UserError(
                f"{path}: exists and is not a run (no manifest.json); choose another results_dir or prefix"
            )
        old = read_manifest(path)
        different = differences(identity(old), identity(manifest))
        # A stopped run that was itself started with overwrite is resumed by the same command.
        begun_by_it = (old.get("config") or {}).get("overwrite")
        same_command = begun_by_it and not different and not is_finished(path)
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
            if history := _resumed_with(old, manifest):
                manifest["resumed_with"] = history
            if same_but_for_command(old, manifest):  # closing a run again writes the same bytes
                manifest = old
    path.mkdir(exist_ok=True)
    (path / "failure.json").unlink(missing_ok=True)
    write_json_atomic(path / "manifest.json", manifest)
    if overwrite:
        # A copy of the run elsewhere, such as in a bucket, keeps its files until they are rewritten: the old
        # summary must not remain there beside the new run.
        write_json_atomic(path / "summary.json", {"status": "unfinished"})


def _resumed_with(old: dict[str, Any], new: dict[str, Any]) -> list[list[str]]:
    """All changes of device, layout or versions in the course of this run."""
    history = old.get("resumed_with") or []
    if not (changed := rounding_differences(old, new)):
        return history
    console.print(
        f"resuming with changes: {'; '.join(changed)}. The result is the same up to rounding, but not"
        " bit for bit",
        markup=False,
    )
    return [*history, changed]


def _deleted(path: Path) -> Path:
    return path.with_name(f".{path.name}.deleted")


def _clear(path: Path) -> None:
    """Remove what a killed process left half written or half deleted."""
    if _deleted(path).is_symlink():
        _deleted(path).unlink()
    elif _deleted(path).exists():
        shutil.rmtree(_deleted(path))
    for name in ("manifest.json", "sample_render.txt", "summary.json", "failure.json", "selected"):
        for leftover in path.glob(f".{name}.*"):
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
