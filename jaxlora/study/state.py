"""How far the runs of a study are, judged against what the study would run now.

    run_state(config, inputs)       # State("unfinished", "at step 1,204 of 6,338")

A run counts only if its own manifest says that it is the run asked for: the same configuration where that
changes a result, the same bytes of data, the same base. That a folder exists means nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from jaxlora.checkpoints.base import fingerprint
from jaxlora.checkpoints.peft import WEIGHTS
from jaxlora.config import RunConfig, to_dict
from jaxlora.data.sources import locate
from jaxlora.models.families import count_parameters
from jaxlora.runtime.errors import UserError
from jaxlora.runtime.files import read_json, read_jsonl, sha256_of
from jaxlora.train.job import locate_model
from jaxlora.train.manifest import differences, identity
from jaxlora.train.run_directory import is_finished

Kind = Literal["done", "missing", "unfinished", "failed", "redo", "foreign", "waiting"]
DIVERGED = "Diverged"  # the error of a loss that is not finite: every repetition would end in it


@dataclass(frozen=True)
class State:
    """How far a piece of work is, and why, in a few words.

    done: there and valid. missing: not begun. unfinished: goes on from where it stopped. failed: ended in an
    error. redo: there, but what it follows from has changed since. foreign: of another configuration, and
    never overwritten unless asked. waiting: what comes before it is not done.
    """

    kind: Kind
    why: str = ""

    @property
    def final(self) -> bool:
        """Nothing is left to do: done, or failed in a way that every repetition would fail."""
        return self.kind == "done" or (self.kind == "failed" and self.why.startswith(DIVERGED))


@dataclass(frozen=True)
class Inputs:
    """What all runs of a study share, known by its bytes."""

    train_sha256: str
    validation_sha256: str
    base: str  # fingerprint
    parameters: int


def read_inputs(config: RunConfig) -> Inputs:
    """Hash the data and the base of a configuration.

    Raises:
      UserError: one of them is not there, or the base is drawn at random, anew for every seed.
    """
    if config.model.random_weights:
        raise UserError("config.model.random_weights: the runs of a study share one base; give a real one")
    folder, model = locate_model(config)
    assert folder is not None
    return Inputs(
        sha256_of(locate(config.data.train_path)),
        sha256_of(locate(config.data.validation_path)),
        fingerprint(folder),
        count_parameters(model),
    )


def run_state(config: RunConfig, inputs: Inputs) -> State:
    """How far the training run of this configuration is."""
    folder = config.run_dir
    if not (folder / "manifest.json").is_file():
        return State("missing")
    manifest = read_json(folder / "manifest.json")
    if different := _differences(manifest, config, inputs):
        return State("foreign", "; ".join(different))
    if is_finished(folder):
        if not (folder / "selected" / WEIGHTS).is_file():
            return State("redo", f"finished, but selected/{WEIGHTS} is gone")
        return State("done")
    if (folder / "failure.json").is_file():
        error = " ".join(str(read_json(folder / "failure.json").get("error", "no reason recorded")).split())
        return State("failed", error)
    file = folder / "metrics.jsonl"
    step = max((row["step"] or 0 for row in read_jsonl(file)), default=0) if file.is_file() else 0
    return State("unfinished", f"at step {step:,} of {manifest['schedule']['total_steps']:,}")


def _differences(manifest: dict[str, Any], config: RunConfig, inputs: Inputs) -> list[str]:
    """Where a run differs from the one asked for, as far as can be said without tokenising the rows."""
    data = {"train": {"sha256": inputs.train_sha256}, "validation": {"sha256": inputs.validation_sha256}}
    base = {"fingerprint": inputs.base, "parameters": inputs.parameters}
    asked = identity({"config": to_dict(config), "dataset": data, "base": base})
    known = {name: value for name, value in asked.items() if not name.endswith("tokens_sha256")}
    tokenizer = "model.tokenizer"  # stands for the tokens' hash, which a resumed run compares
    own = (manifest.get("config") or {}).get("model") or {}
    return differences(
        identity(manifest) | {tokenizer: own.get("tokenizer")}, known | {tokenizer: config.model.tokenizer}
    )
