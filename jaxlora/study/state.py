"""The progress of a study's runs, judged against what the study would run now.

    run_state(config, inputs)       # State("unfinished", "at step 1,204 of 6,338")

A run counts only if its own manifest identifies it as the requested run: the same configuration (as far as it
affects results), the same data bytes, the same base. A finished run counts only if its files are still those
it finished with. The existence of a folder means nothing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from jaxlora.checkpoints.base import find_base
from jaxlora.checkpoints.peft import ADAPTER_FILES
from jaxlora.config import RunConfig, to_dict
from jaxlora.data.render import TOKENIZER_SUFFIXES
from jaxlora.data.sources import locate
from jaxlora.models.families import count_parameters
from jaxlora.runtime.errors import UserError
from jaxlora.runtime.files import Record, read_json, read_jsonl, sha256_of
from jaxlora.runtime.records import contradiction, read_metrics, read_summary
from jaxlora.runtime.remote import resolve
from jaxlora.train.manifest import differences, identity
from jaxlora.train.run_directory import is_finished

Kind = Literal["done", "missing", "unfinished", "failed", "redo", "damaged", "foreign", "waiting"]
DIVERGED = "Diverged"  # the error of a non-finite loss, which every repetition would hit
SELECTED = "selected"  # the folder of a run's selected adapter, which can be restored from a checkpoint
RUN_FILES = ("metrics.jsonl", *(f"{SELECTED}/{name}" for name in ADAPTER_FILES))  # read after a run has ended


@dataclass(frozen=True)
class State:
    """The progress of a piece of work, and a short reason.

    done: present and valid. missing: not begun. unfinished: continues from where it stopped. failed: ended in
    an error. redo: present, but its inputs have changed since, or it can be restored from intact files.
    damaged: changed since it was written, and can only be restored by training again. foreign: of another
    configuration, and never overwritten unless asked. waiting: its prerequisites are not done.
    """

    kind: Kind
    why: str = ""

    @property
    def final(self) -> bool:
        """Whether nothing is left to do: it is done, or failed in a way that every repetition would."""
        return self.kind == "done" or (self.kind == "failed" and self.why.startswith(DIVERGED))


# --- Inputs of all runs -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Inputs:
    """What all runs of a study share, identified by content."""

    train_sha256: str
    validation_sha256: str
    base: str  # fingerprint
    parameters: int
    tokenizer_sha256: str | None  # None: not in a local folder


def read_inputs(config: RunConfig) -> Inputs:
    """Hash the data, the base and the tokenizer of a configuration.

    Raises:
      UserError: one of them is missing, or the base is random and so differs for every seed.
    """
    if config.model.random_weights:
        raise UserError("config.model.random_weights: the runs of a study share one base; give a real one")
    base = find_base(config.model)
    assert base.folder is not None
    return Inputs(
        sha256_of(locate(config.data.train_path)),
        sha256_of(locate(config.validation_file)),
        base.fingerprint(),
        count_parameters(base.config),
        _tokenizer_sha256(resolve(config.model.tokenizer) if config.model.tokenizer else base.folder),
    )


def _tokenizer_sha256(folder: Path) -> str | None:
    if not folder.is_dir():
        return None
    digest = hashlib.sha256()
    for file in sorted(folder.iterdir()):
        if file.suffix in TOKENIZER_SUFFIXES and file.is_file():
            digest.update(f"{file.name}\0{sha256_of(file)}\0".encode())
    return digest.hexdigest()


def check_unchanged(then: Inputs, config: RunConfig) -> None:
    """Refuse to continue if a file that runs have read has changed.

    Raises:
      UserError: names the configuration field whose file has changed.
    """
    now = read_inputs(config)
    places = {
        "train_sha256": f"config.data.train_path: {config.data.train_path}",
        "validation_sha256": f"config.data.validation_path: {config.data.validation_path}",
        "tokenizer_sha256": f"config.model.tokenizer: {config.model.tokenizer or config.model.path}",
    }
    for field in fields(Inputs):
        if getattr(then, field.name) != getattr(now, field.name):
            place = places.get(field.name, f"config.model.path: {config.model.path}")
            raise UserError(
                f"{place} changed while the study was running. Put back what it was and give the same"
                " command; a study of the new files needs another --config.prefix"
            )


# --- Runs ---------------------------------------------------------------------------------------------------


def run_state(config: RunConfig, inputs: Inputs, note: Record | None = None) -> State:
    """The progress of the training run with this configuration.

    Args:
      note: its entry in `selection.json`, used if the run itself recorded no hashes.
    """
    folder = config.run_dir
    if not (folder / "manifest.json").is_file():
        return State("missing")
    finished = _finished_state(folder, note or {}) if is_finished(folder) else None
    if finished is not None and finished.kind == "damaged":
        return finished  # first, because a damaged manifest may look like another run's
    manifest = read_json(folder / "manifest.json")
    if different := _differences(manifest, config, inputs):
        return State("foreign", "; ".join(different))
    if finished is not None:
        return finished
    if (folder / "failure.json").is_file():
        error = " ".join(str(read_json(folder / "failure.json").get("error", "no reason recorded")).split())
        return State("failed", error)
    file = folder / "metrics.jsonl"
    step = max((row["step"] or 0 for row in read_jsonl(file)), default=0) if file.is_file() else 0
    return State("unfinished", f"at step {step:,} of {manifest['schedule']['total_steps']:,}")


def selected_sha256(folder: Path) -> dict[str, str]:
    """The SHA-256 of each file of a run's selected adapter, by its name in RUN_FILES."""
    return _hashes(folder, [name for name in RUN_FILES if name.startswith(SELECTED)])


def _hashes(folder: Path, names: Iterable[str]) -> dict[str, str]:
    return {name: sha256_of(folder / name) for name in names if (folder / name).is_file()}


def _finished_state(folder: Path, note: Record) -> State:
    """Whether a finished run's files are still those it finished with."""
    summary, rows, wrong = read_summary(folder), [], {}
    try:
        rows = read_metrics(folder)
    except UserError as error:
        wrong["metrics.jsonl"] = str(error)
    expected = summary.get("sha256")
    if expected is None:  # of an earlier version; a note about a run with other losses is about another run
        nll = {str(row["step"]): row.get("loss") for row in rows if row["split"] == "validation"}
        expected = note.get("selected_sha256", {}) if note.get("validation_nll") == nll else {}
    names = dict.fromkeys((*RUN_FILES, *expected))
    now = _hashes(folder, names)
    for name in names:
        if name not in now:
            wrong[name] = f"{name} is gone"
        elif expected.get(name, now[name]) != now[name]:
            wrong[name] = f"{name} is not what was written (its SHA-256 differs)"
    if "metrics.jsonl" not in wrong and (text := contradiction(summary, rows)):
        wrong["metrics.jsonl"] = f"metrics.jsonl and summary.json contradict each other ({text})"
    if any(not name.startswith(SELECTED) for name in wrong):
        return State("damaged", "; ".join(wrong.values()))
    if wrong:
        return State("redo", f"finished, but {'; '.join(wrong.values())}")
    return State("done")


def _differences(manifest: dict[str, Any], config: RunConfig, inputs: Inputs) -> list[str]:
    """How a run differs from the requested one, as far as can be determined without tokenising the rows."""
    data = {"train": {"sha256": inputs.train_sha256}, "validation": {"sha256": inputs.validation_sha256}}
    base = {"fingerprint": inputs.base, "parameters": inputs.parameters}
    asked = identity({"config": to_dict(config), "dataset": data, "base": base})
    unknown = ("tokenizer", *(name for name in asked if name.endswith("tokens_sha256")))
    known = {name: value for name, value in asked.items() if name not in unknown}
    tokenizer = "model.tokenizer"  # stands in for the hash of the tokens, which a resumed run compares
    own = (manifest.get("config") or {}).get("model") or {}
    return differences(
        identity(manifest) | {tokenizer: own.get("tokenizer")}, known | {tokenizer: config.model.tokenizer}
    )
