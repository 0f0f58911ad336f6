"""Commands that are cheap to start, watched, killed and paused: training runs, and the others that write.

    lab = Lab(folder)                                    # a small run, once undisturbed
    lab.kill_at(folder, "half a metrics line")           # SIGKILL at this moment
    run = lab.pause_at(folder, "hashed, not published")  # SIGSTOP: now do something to its files
    run.go_on(); lab.finish(folder)                      # the same command again; compares
    tool = Tool(folder, words, outcome)                  # any other script, with the same methods

A fork server imports everything once and initialises no backend; each run is a fork of it that calls the real
entry point. Inside it, functions of the package are wrapped from outside, to say in a shared byte each in
which phase the run is, and to kill or stop the process at a named moment. What can be done to files is in
`helpers.trials`.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import mmap
import os
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from helpers.forks import Fork, keep_every_program, server, wrap
from helpers.xla_flags import xla_flags
from jaxlora.runtime.files import sha256_of

REPOSITORY = Path(__file__).resolve().parents[2]
TIMES = {"seconds", "tokens_per_second", "model_flops_utilisation", "peak_memory_bytes"}
# phase: module, class or None, function; the phase lasts while the function runs, on whichever thread
PHASES = {
    "loading": ("jaxlora.train.job", None, "prepare"),
    "taking over": ("jaxlora.train.run_directory", None, "_take_over"),
    "restoring": ("jaxlora.checkpoints.run_state", "RunState", "restore"),
    "rewinding": ("jaxlora.train.run_directory", "RunDirectory", "start_records"),
    "metrics": ("jaxlora.train.run_directory", "RunDirectory", "record"),
    "validation": ("jaxlora.train.loop", None, "validate"),
    "saving": ("jaxlora.checkpoints.run_state", "RunState", "save"),
    "writing a checkpoint": ("jaxlora.checkpoints.run_state", "RunState", "_finish"),
    "hashing": ("jaxlora.checkpoints.run_state", None, "hashes"),
    "publishing": ("jaxlora.checkpoints.run_state", "RunState", "_publish"),
    "pruning": ("jaxlora.checkpoints.run_state", "RunState", "_prune"),
    "training": ("jaxlora.train.loop", "Run", "to_the_end"),
    "export": ("jaxlora.train.run_directory", "RunDirectory", "export_selected"),
    "summary": ("jaxlora.train.run_directory", "RunDirectory", "finish"),
}
# phases within others: the innermost names the kill
INNER = ["metrics", "hashing", "publishing", "pruning", "saving", "validation", "writing a checkpoint"]


RUN_ID = "tiny-all_layer-seed-0"


def options(folder: Path) -> list[str]:
    """The command line of a small run: two layers, 24 steps, 6 validations, a checkpoint every 2 steps."""
    from helpers.hf_models import make_checkpoint

    sizes = {"vocab_size": 1024, "hidden_size": 32, "num_hidden_layers": 2, "tie_word_embeddings": True}
    make_checkpoint(folder, initializer_range=0.05, **sizes)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(REPOSITORY / "jaxlora" / "embedded" / "base" / name, folder)
    fields = {
        "model.path": folder,
        "data.train_rows": 24,
        "data.validation_rows": 8,
        "train.batch_rows": 2,
        "train.epochs": 2,
        "train.validation_every": 5,
        "train.validation_merge": 0,
        "train.validation_batch_rows": 4,
        "train.checkpoint_every": 2,
        "train.startup_check": "false",
        "eval.after_training": "false",
    }
    config = ["--config", str(REPOSITORY / "configs" / "tiny.py")]
    return config + [f"--config.{name}={value}" for name, value in fields.items()]


class Started:
    """A process that was started, with its standard error in a file."""

    process: Any
    _log: Path

    def send(self, signum: int) -> None:
        """Send a signal, if the process is still there."""
        if self.process.is_alive():
            os.kill(self.process.pid, signum)

    def wait_until_stopped(self, seconds: float = 120) -> None:
        """Wait until the process has stopped itself."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and self.process.is_alive():
            # The state follows the program's name, which is in parentheses.
            if Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()[0] == "T":
                return
            time.sleep(0.01)
        raise AssertionError(f"the moment never came:\n{self.log()}")

    def go_on(self) -> int:
        """Let a stopped process go on to its end; its exit code."""
        self.send(signal.SIGCONT)
        return self.wait()

    def wait(self, seconds: float = 240) -> int:
        """The exit code; negative: the signal that killed it."""
        self.process.join(seconds)
        if self.process.is_alive():
            self.process.kill()
            raise AssertionError(f"the run did not end within {seconds} s:\n{self.log()}")
        return self.process.exitcode

    def log(self) -> str:
        """What the process wrote to the terminal."""
        return self._log.read_text() if self._log.exists() else ""


class Run(Started):
    """One process of the entry point over a results folder, with its standard error in a file."""

    def __init__(
        self,
        words: list[str],
        folder: Path,
        compiled: Path,
        run_id: str = RUN_ID,
        moment: str | None = None,
        nth: int = 1,
        signum: int = signal.SIGKILL,
    ):
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / "results" / run_id
        start = time.monotonic_ns()
        self._log, self._phases = folder / f"log-{start}.txt", folder / f"phases-{start}"
        self._phases.write_bytes(bytes(len(PHASES)))
        self._size = self._written()
        self.started = time.monotonic()
        words = [*words, f"--config.results_dir={folder / 'results'}"]
        arguments = (words, str(compiled), str(self._log), str(self._phases), moment, nth, signum)
        self.process = server().Process(target=_child, args=arguments)
        self.process.start()

    def wait_for_steps(self) -> float | None:
        """Wait until this process has recorded something; seconds from its start, None if it never did."""
        seen = self._size
        while self.process.is_alive():
            size = self._written()
            if size > seen:
                return time.monotonic() - self.started
            seen = min(seen, size)  # cut back to the checkpoint
            time.sleep(0.01)
        return None

    def phase(self) -> str:
        """The innermost phase that the process was in last."""
        inside = [name for name, byte in zip(PHASES, self._phases.read_bytes(), strict=True) if byte]
        for name in INNER:
            if name in inside:
                return name
        return inside[-1] if inside else "between phases"

    def _written(self) -> int:
        file = self.path / "metrics.jsonl"
        return file.stat().st_size if file.is_file() else 0


class Program(Started):
    """One process of any script of the repository."""

    def __init__(
        self, words: Sequence[str | Path], cwd: Path, log: Path, moment: tuple[str, int, int] | None
    ):
        self._log = log
        environment = os.environ | {"XLA_FLAGS": xla_flags(devices=1)}
        self.process = Fork(words, cwd=cwd, environment=environment, log=log, moment=moment).process


class Disturbed:
    """A command over folders of its own, disturbed in each, and what an undisturbed one leaves."""

    folder: Path
    expected: dict[str, Any]

    def __init__(self) -> None:
        self.kills: Counter[str] = Counter()
        self._folders = 0

    def start(self, folder: Path, *words: str, **moment) -> Any:
        raise NotImplementedError

    def new_folder(self) -> Path:
        self._folders += 1
        return self.folder / f"run-{self._folders}"

    def pause_at(self, folder: Path, moment: str, *words: str, nth: int = 1) -> Any:
        """Start or resume, and stop at this moment, until `go_on`."""
        run = self.start(folder, *words, moment=moment, nth=nth, signum=signal.SIGSTOP)
        run.wait_until_stopped()
        return run

    def kill_at(self, folder: Path, moment: str, *words: str, nth: int = 1) -> Any:
        """Start or resume, and die at this moment."""
        run = self.start(folder, *words, moment=moment, nth=nth)
        code = run.wait()
        assert code == -signal.SIGKILL, f"'{moment}' never came (exit code {code}):\n{run.log()}"
        self.kills[f"at '{moment}'"] += 1
        return run

    def report(self, capsys) -> None:
        with capsys.disabled():
            print(f"\n{self.kills.total()} kills survived:")
            for name, count in sorted(self.kills.items()):
                print(f"  {count:3} {name}")


class Tool(Disturbed):
    """A script that writes something else than a run: evaluation, export, dataset, study."""

    def __init__(
        self,
        folder: Path,
        words: Callable[[Path], Sequence[str | Path]],
        outcome: Callable[[Path], dict[str, Any]],
        prepare: Callable[[Path], object] = lambda folder: None,
    ):
        """
        Args:
          folder: for the folders that it works in.
          words: the command line over a folder; the folder is also the working directory.
          outcome: what it has left there, without what may differ between two runs of the command.
          prepare: puts into a folder what must be there before.
        """
        super().__init__()
        self.folder, self.words, self.outcome, self._prepare = folder, words, outcome, prepare
        self.whole = self.new_folder()
        self.finish(self.whole, first=True)

    def new_folder(self) -> Path:
        folder = super().new_folder()
        folder.mkdir(parents=True)
        self._prepare(folder)
        return folder

    def start(
        self, folder: Path, *words: str, moment: str | None = None, nth: int = 1, signum: int = signal.SIGKILL
    ) -> Program:
        """Give the command over a folder, with further options."""
        log = self.folder / f"log-{time.monotonic_ns()}.txt"
        when = None if moment is None else (moment, nth, signum)
        return Program([*self.words(folder), *words], folder, log, when)

    def finish(self, folder: Path, *words: str, first: bool = False) -> Program:
        """Give the command, which must succeed, and compare with the undisturbed one (or be that)."""
        program = self.start(folder, *words)
        assert program.wait() == 0, program.log()
        if first:
            self.expected = self.outcome(folder)
        self.compare(folder)
        return program

    def compare(self, folder: Path) -> None:
        different = differing(self.outcome(folder), self.expected)
        assert not different, f"{', '.join(different)} in {folder}; the kills were {dict(self.kills)}"


class Lab(Disturbed):
    """Runs of one small job, in folders of their own, and what an undisturbed one gives."""

    def __init__(self, folder: Path, compiled: Path, *words: str, run_id: str = RUN_ID):
        super().__init__()
        self.folder, self.options = folder, [*options(folder / "model"), *words]
        self.compiled, self.run_id = compiled, run_id
        self.resumed: list[float] = []
        self.whole = whole = self.start(self.new_folder())
        assert whole.wait() == 0, whole.log()
        self.expected = outcome(whole.path)

    def start(self, folder: Path, *words: str, **moment) -> Run:
        """Start or resume the run of a folder, with further options."""
        return Run([*self.options, *words], folder, self.compiled, self.run_id, **moment)

    def finish(self, folder: Path, *words: str) -> Run:
        """Resume to the end, and compare."""
        run = self.start(folder, *words)
        if (seconds := run.wait_for_steps()) is not None:
            self.resumed.append(seconds)
        assert run.wait() == 0, run.log()
        self.compare(run)
        return run

    def compare(self, run: Run) -> None:
        different = differing(outcome(run.path), self.expected)
        assert not different, f"{', '.join(different)} in {run.path}; the kills were {dict(self.kills)}"

    def report(self, capsys) -> None:
        super().report(capsys)
        with capsys.disabled():
            if self.resumed:
                print(f"resumed in {sum(self.resumed) / len(self.resumed):.1f} s on average")


def _child(
    words: list[str], cache: str, log: str, phases: str, moment: str | None, nth: int, signum: int
) -> None:
    os.environ["XLA_FLAGS"] = xla_flags(devices=1)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = cache
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    sys.argv = ["train.py", *words]
    with open(phases, "r+b") as file:
        _announce_phases(mmap.mmap(file.fileno(), len(PHASES)))
    keep_every_program()
    if moment is not None:
        arm(moment, nth, signum)
    specification = importlib.util.spec_from_file_location("launch_train", REPOSITORY / "launch" / "train.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    module.run_main(module.main)


def _announce_phases(board: mmap.mmap) -> None:
    for index, place in enumerate(PHASES.values()):

        def announcing(original, *args, index=index, **kwargs):
            board[index] += 1
            try:
                return original(*args, **kwargs)
            finally:
                board[index] -= 1

        wrap(*place, announcing)


# --- Moments ------------------------------------------------------------------------------------------------


_signum: int = signal.SIGKILL


def arm(moment: str, nth: int, signum: int) -> None:
    """Have this process send itself a signal when this moment comes for the nth time."""
    global _signum
    _signum = signum
    MOMENTS[moment](_countdown(nth))


def die() -> None:
    os.kill(os.getpid(), _signum)


def _countdown(nth: int) -> Iterator[bool]:
    left = nth
    while True:
        left -= 1
        yield left == 0


def _before(module: str, owner: str | None, name: str) -> Callable:
    def install(now: Iterator[bool]) -> None:
        def around(original, *args, **kwargs):
            if next(now):
                die()
            return original(*args, **kwargs)

        wrap(module, owner, name, around)

    return install


def _after(module: str, owner: str | None, name: str) -> Callable:
    def install(now: Iterator[bool]) -> None:
        def around(original, *args, **kwargs):
            result = original(*args, **kwargs)
            if next(now):
                die()
            return result

        wrap(module, owner, name, around)

    return install


def _part_of_a_line(share: float) -> Callable:
    def install(now: Iterator[bool]) -> None:
        def around(original, path, record):
            if next(now):
                line = (json.dumps(record) + "\n").encode()
                with open(path, "ab") as file:
                    file.write(line[: int(share * len(line)) or 1])
                die()
            return original(path, record)

        wrap("jaxlora.train.run_directory", None, "append_jsonl", around)

    return install


def _half_json(module: str, file: str) -> Callable:
    """Dies with the temporary file of an atomic write half written."""

    def install(now: Iterator[bool]) -> None:
        def around(original, path, value):
            if path.name == file and next(now):
                text = json.dumps(value)
                path.with_name(f".{path.name}.{os.getpid()}.tmp").write_text(text[: len(text) // 2])
                die()
            return original(path, value)

        wrap(module, None, "write_json_atomic", around)

    return install


def _half_deleted(now: Iterator[bool]) -> None:
    import jaxlora.checkpoints.run_state as module

    class HalfWay:
        """`shutil`, whose rmtree deletes every other file of a checkpoint and dies."""

        def __getattr__(self, name):
            import shutil

            return getattr(shutil, name)

        def rmtree(self, path, ignore_errors=False):
            import shutil

            files = [p for p in Path(path).rglob("*") if p.is_file()]
            if files and next(now):
                for victim in files[::2]:
                    victim.unlink()
                die()
            shutil.rmtree(path, ignore_errors=ignore_errors)

    module.shutil = HalfWay()


def _half_exported(now: Iterator[bool]) -> None:
    def around(original, tensors, path, *args, **kwargs):
        if next(now):
            Path(path).write_bytes(b"\0" * 100)
            die()
        return original(tensors, path, *args, **kwargs)

    for module in ("jaxlora.checkpoints.peft", "jaxlora.checkpoints.base"):  # an adapter, all weights
        wrap(module, None, "save_file", around)


STATE, FILES, LOOP = "jaxlora.checkpoints.run_state", "jaxlora.train.run_directory", "jaxlora.train.loop"
MOMENTS: dict[str, Callable[[Iterator[bool]], None]] = {
    "gate looked at, rows not read": _before("jaxlora.train.job", None, "_load_rows"),
    "rows read, no manifest": _before(FILES, None, "make_manifest"),
    "half a manifest": _half_json(FILES, "manifest.json"),
    "manifest written, nothing else": _after(FILES, None, "_take_over"),
    "manifest written, base not loaded": _before(LOOP, None, "load_frozen"),
    "curves deleted, not yet rewritten": _before("jaxlora.train.board", None, "_write_settings"),
    "between rewind and first step": _before(LOOP, "Run", "to_the_end"),
    "a step computed, not yet recorded": _before(LOOP, "StepLog", "add"),
    "one byte of a metrics line": _part_of_a_line(0),
    "half a metrics line": _part_of_a_line(0.5),
    "a metrics line without its newline": _part_of_a_line(0.9999),
    "in the middle of a validation": _before("jaxlora.train.display", "TrainingDisplay", "validating"),
    "validated, not yet recorded": _before(FILES, "RunDirectory", "validation_record"),
    "checkpoint begun": _before(STATE, "RunState", "save"),
    "arrays on their way to the disk": _after(STATE, "RunState", "save"),
    "arrays written, not hashed": _before(STATE, None, "hashes"),
    "half a hash list": _half_json(STATE, "sha256.json"),
    "hashed, not published": _before(STATE, "RunState", "_publish"),
    "published, older ones not deleted": _before(STATE, "RunState", "_prune"),
    "an older checkpoint half deleted": _half_deleted,
    "half an adapter exported": _half_exported,
    "exported, no summary": _before(FILES, "RunDirectory", "finish"),
    "half a summary": _half_json(FILES, "summary.json"),
}


def _renamed(before: bool, named: Callable[[Path], bool]) -> Callable:
    """Before or after a folder or file with such a name is given its final one."""

    def install(now: Iterator[bool]) -> None:
        def around(original, source, target):
            mine = named(Path(source)) and next(now)
            if mine and before:
                die()
            result = original(source, target)
            if mine and not before:
                die()
            return result

        wrap("os", None, "replace", around)
        wrap("pathlib", "Path", "rename", around)

    return install


def _staged(name: str) -> Callable[[Path], bool]:
    """Whether a file is this one, written beside its place."""
    return lambda path: path.name.startswith(f".{name}.") and path.name.endswith(".tmp")


def _finished_folder(path: Path) -> bool:
    return path.suffix in (".partial", ".building")


def _in_the_answers(now: Iterator[bool]) -> None:
    def around(original, *args, progress, **kwargs):
        def advance(*done):
            if next(now):
                die()
            progress(*done)

        return original(*args, progress=advance, **kwargs)

    wrap("jaxlora.evals.run", None, "generate", around)


def _half_a_copy(now: Iterator[bool]) -> None:
    """Dies with the first half of a copied file in its place."""

    def around(original, source, out, names):
        if next(now):
            name = next(name for name in names if (Path(source) / name).is_file())
            content = (Path(source) / name).read_bytes()
            (Path(out) / name).write_bytes(content[: len(content) // 2])
            die()
        return original(source, out, names)

    for module in ("jaxlora.checkpoints.peft", "jaxlora.checkpoints.base"):
        wrap(module, None, "copy_files", around)


SUBJECTS, BUILD = "jaxlora.evals.subjects", "jaxlora.data.build"
EVALUATION: dict[str, Callable[[Iterator[bool]], None]] = {
    "claimed, base not loaded": _before(SUBJECTS, None, "load_target_base"),
    "base loaded, nothing answered": _before(SUBJECTS, None, "evaluate"),
    "in the middle of the answers": _in_the_answers,
    "answered, nothing written": _before("jaxlora.evals.run", None, "replace_together"),
    "all staged, no file in its place": _renamed(True, _staged("predictions.jsonl")),
    "predictions in their place, no metrics": _renamed(True, _staged("metrics.jsonl")),
    "metrics in their place, an older summary": _renamed(True, _staged("summary.json")),
    "evaluated, no point in the curves": _before("jaxlora.evals.run", None, "write_outcome"),
}
EXPORT: dict[str, Callable[[Iterator[bool]], None]] = {
    "half of the weights exported": _half_exported,
    "half of a copied file": _half_a_copy,
    "exported, not in its place": _renamed(True, _finished_folder),
    "exported and in its place": _renamed(False, _finished_folder),
}
BUILDING: dict[str, Callable[[Iterator[bool]], None]] = {
    "a row accepted": _before(BUILD, "_Spool", "add"),
    "rows accepted, not split": _before("jaxlora.data.curation", None, "split_by_problem"),
    "a row of a part written": _before(BUILD, "_Spool", "read"),
    "half a dataset's manifest": _half_json(BUILD, "manifest.json"),
    "built, not synced": _before(BUILD, None, "_publish"),
    "built, not in its place": _renamed(True, _finished_folder),
    "in its place, the older one not deleted": _renamed(False, _finished_folder),
}
RUN_MOMENTS = tuple(MOMENTS)  # of a run without an evaluation after it
MOMENTS |= EVALUATION | EXPORT | BUILDING

AFTER_TRAINING = "finished, not evaluated"  # comes only with eval.after_training
MOMENTS[AFTER_TRAINING] = _before("jaxlora.evals.after_training", None, "evaluate_base_and_selected")


# --- What a finished run is ---------------------------------------------------------------------------------


def outcome(run: Path) -> dict[str, bytes | list]:
    """Everything of a finished run that must not depend on how often it was disturbed."""
    lines = (run / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    records = [{k: v for k, v in json.loads(line).items() if k not in TIMES} for line in lines]
    found: dict[str, bytes | list] = {"metrics.jsonl": [json.dumps(record) for record in records]}
    for path in sorted([run / "summary.json", run / "sample_render.txt", *(run / "selected").iterdir()]):
        found[path.relative_to(run).as_posix()] = path.read_bytes()
    summary = json.loads(found["summary.json"])
    for name in ("metrics.jsonl", "manifest.json"):  # these hold times and the command
        assert summary["sha256"].pop(name) == sha256_of(run / name), f"the summary's hash of {name}"
    found["summary.json"] = json.dumps(summary).encode()
    found["files"] = sorted(path.name for path in run.iterdir())
    found["checkpoints"] = sorted(path.name for path in (run / "checkpoints").iterdir())
    return found


def differing(ours: dict, theirs: dict) -> list[str]:
    """Names of what differs between two outcomes."""
    return [name for name in sorted({*ours, *theirs}) if ours.get(name) != theirs.get(name)]
