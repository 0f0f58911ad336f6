"""Log the curves of a run to Weights & Biases or Trackio as well, if `config.tracking` names one.

    tracker = Tracker(config)                # only used if config.tracking is set
    tracker.write({"train/loss": 0.52}, step=1)
    tracker.close()

Both are extras (`pip install 'jaxlora[wandb]'`). They receive only the configuration and the numbers of
`metrics.jsonl`: no code, command line, environment or console output. Keys stay in the environment, where the
libraries read them. Whether anything leaves the machine is up to the library: `WANDB_MODE=offline` keeps a
run in its directory, and Trackio is local unless it is given a Space.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxlora.config import RunConfig, to_dict
from jaxlora.runtime.errors import UserError
from jaxlora.runtime.progress import console
from jaxlora.runtime.text import harmless, without_secrets


def check_tracking(config: RunConfig) -> None:
    """Refuse a tracker that is not installed, before anything is loaded.

    Raises:
      UserError: names what to install.
    """
    name = config.tracking
    if name is not None and importlib.util.find_spec(name) is None:
        raise UserError(
            f"config.tracking: {name} is not installed; pip install 'jaxlora[{name}]', or give none"
        )


class Tracker:
    """One run in the configured tracker. A failure of the tracker never ends a run."""

    def __init__(self, config: RunConfig):
        """Start the run in the tracker, or continue it: its id is derived from the run directory's path.

        Raises:
          UserError: the tracker refuses it, for example without a key and without `WANDB_MODE=offline`.
        """
        self._name = str(config.tracking)
        run_id = hashlib.sha256(str(config.run_dir.resolve()).encode()).hexdigest()[:16]
        try:
            self._library = importlib.import_module(self._name)
            self._run = _OPEN[self._name](self._library, config, run_id)
        except Exception as error:  # each library raises its own kinds
            raise UserError(f"config.tracking: {self._name} failed to start: {_line(error)}") from None

    def write(self, values: Mapping[str, float], step: int) -> None:
        """Add numbers of a step."""
        if self._run is None:
            return
        try:
            self._library.log(dict(values), step=step)
        except Exception as error:
            self._run = None
            console.print(f"{self._name} no longer accepts metrics: {_line(error)}", markup=False)

    def close(self) -> None:
        """Wait until all numbers have been delivered."""
        if self._run is None:
            return
        self._run = None
        try:
            self._library.finish()
        except Exception as error:
            console.print(f"{self._name} did not finish cleanly: {_line(error)}", markup=False)


def _open_wandb(library: Any, config: RunConfig, run_id: str) -> Any:
    folder = Path(config.run_dir)
    settings = library.Settings(
        console="off", disable_git=True, disable_code=True, save_code=False, x_disable_meta=True
    )
    return library.init(
        project=config.prefix,
        name=config.run_id,
        id=run_id,
        resume="allow",
        dir=str(folder),
        config=to_dict(config),
        settings=settings,
    )


def _open_trackio(library: Any, config: RunConfig, run_id: str) -> Any:
    return library.init(
        project=config.prefix,
        name=f"{config.run_id}-{run_id[:6]}",
        resume="allow",
        config=to_dict(config),
        auto_log_gpu=False,
    )


_OPEN = {"wandb": _open_wandb, "trackio": _open_trackio}


def _line(error: Exception) -> str:
    text = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return harmless(without_secrets(text))
