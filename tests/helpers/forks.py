"""Python programs as forks of a server that has imported everything: a start costs 0.1 s instead of 3 s.

    fork = Fork(["launch/study.py", "--config", ...], cwd=folder, environment=os.environ | own, log=file)
    fork.wait(900)                                   # the exit code; negative: the signal that killed it
    done = run(["tools/preview.py", ...], cwd=repository)            # .returncode, .stdout, .stderr

From the first line of the script on it is what `python SCRIPT ...` is: a process of its own, with its own
environment, files and process group. The server initialises no backend, so each fork has the devices that its
`XLA_FLAGS` ask for.
"""

from __future__ import annotations

import atexit
import functools
import importlib
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

PRELOAD = [
    "helpers.kills",
    "jaxlora.study.pipeline",
    "jaxlora.train.loop",
    "matplotlib.backends.backend_agg",
    "matplotlib.figure",
    "tensorboard.summary",
    "transformers.models.auto.tokenization_auto",
    "transformers.models.qwen2.tokenization_qwen2",
    "transformers.tokenization_utils_tokenizers",
]


def server() -> multiprocessing.context.BaseContext:
    """A context whose processes are forks of a process that has imported everything."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    return context


class Fork:
    """One program, started; with the methods of `subprocess.Popen` that the tests use."""

    def __init__(
        self,
        words: Sequence[str | Path],
        *,
        cwd: Path,
        environment: Mapping[str, str],
        log: Path,
        output: Path | None = None,
        moment: tuple[str, int, int] | None = None,
    ):
        """
        Args:
          words: the script, then its arguments.
          log: for standard error, and for standard output where `output` is not given.
          moment: name, which time it comes, and the signal that the program sends itself then; of
            `helpers.kills.MOMENTS`.
        """
        arguments = (list(map(str, words)), str(cwd), dict(environment), str(output or log), str(log), moment)
        for file in {output or log, log}:
            file.touch()
        self.process = server().Process(target=_child, args=arguments)
        self.process.start()
        self.pid: int = self.process.pid
        self.log = log

    @property
    def text(self) -> str:
        """What it has written so far to its log."""
        return self.log.read_text(errors="replace")

    def poll(self) -> int | None:
        """The exit code; None while it runs."""
        return self.process.exitcode

    def wait(self, seconds: float) -> int:
        """The exit code.

        Raises:
          subprocess.TimeoutExpired: it still runs.
        """
        self.process.join(seconds)
        if self.process.exitcode is None:
            raise subprocess.TimeoutExpired(str(self.pid), seconds)
        return self.process.exitcode

    def send_signal(self, signum: int) -> None:
        """To this process alone, if it is still there."""
        if self.process.exitcode is None:
            os.kill(self.pid, signum)

    def kill(self) -> None:
        """SIGKILL to it and all that it has started."""
        if self.process.exitcode is None:
            try:
                os.killpg(self.pid, signal.SIGKILL)
            except ProcessLookupError:  # it has not come to its own group yet
                os.kill(self.pid, signal.SIGKILL)


def run(
    words: Sequence[str | Path],
    *,
    cwd: Path,
    environment: Mapping[str, str] | None = None,
    seconds: float = 300,
) -> subprocess.CompletedProcess[str]:
    """Start a script and wait for it, as `subprocess.run(..., capture_output=True, text=True)` does."""
    with tempfile.TemporaryDirectory() as folder:
        output, log = Path(folder, "out"), Path(folder, "err")
        fork = Fork(words, cwd=cwd, environment=environment or os.environ, log=log, output=output)
        try:
            code = fork.wait(seconds)
        finally:
            fork.kill()
        return subprocess.CompletedProcess(list(words), code, output.read_text(), log.read_text())


def wrap(module: str, owner: str | None, name: str, around: Callable) -> None:
    """Replace a function, or a method of a class, by `around(original, ...)`."""
    place = importlib.import_module(module)
    place = getattr(place, owner) if owner else place
    original = getattr(place, name)

    @functools.wraps(original)
    def wrapped(*args, **kwargs):
        return around(original, *args, **kwargs)

    setattr(place, name, wrapped)


def keep_every_program() -> None:
    """Have this process keep all compiled programs, not only those that took a second."""
    wrap("jaxlora.runtime.devices", None, "setup", _keep_every_program)


def _keep_every_program(original, *arguments) -> None:
    import jax

    original(*arguments)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def _child(
    words: list[str],
    cwd: str,
    environment: dict[str, str],
    output: str,
    log: str,
    moment: tuple[str, int, int] | None,
) -> None:
    os.setsid()
    os.chdir(cwd)
    for descriptor, file in ((1, output), (2, log)):
        handle = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        os.dup2(handle, descriptor)
        os.close(handle)
    _tell_jax(environment)
    os.environ.clear()
    os.environ.update(environment)
    time.tzset()
    keep_every_program()
    if moment is not None:
        from helpers import kills  # which imports this module

        kills.arm(*moment)
    sys.argv = words
    sys.path.insert(0, str(Path(words[0]).resolve().parent))
    try:
        runpy.run_path(words[0], run_name="__main__")
    finally:
        atexit._run_exitfuncs()


def _tell_jax(environment: Mapping[str, str]) -> None:
    """JAX read its variables when the server imported it: hand over those that are others here."""
    import jax

    for variable, value in environment.items():
        name = variable.lower()
        if name in jax.config.values and value != os.environ.get(variable):
            kind = type(jax.config.values[name])
            jax.config.update(name, value if kind in (str, type(None)) else kind(float(value)))
