"""Faults done to the files of a run, from outside: damage, full disks, links, and other writers.

    for name, fault in DAMAGE.items(): fault(run / "summary.json")
    with small_disk(folder, "600k") as disk: ...

`try_damage` does faults to files of a copied run, gives the command again, and counts what came of it. The
only ends allowed: the outcome of an undisturbed run, or exit code 2 and one line that names the file. What
another command writes is tried in the same way: give a `start` whose result has `wait` and `log`, and a
`check` of the outcome.
"""

from __future__ import annotations

import contextlib
import shutil
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def truncate(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def write(text: str) -> Callable[[Path], object]:
    return lambda path: path.write_text(text)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "a flipped bit": flip_a_bit,
    "a truncation": truncate,
    "nothing in it": write(""),
    "a missing file": Path.unlink,
}
# What a JSON file may hold that is JSON, and not what is expected there.
JSON_DAMAGE: dict[str, Callable[[Path], object]] = {
    "a list": write("[]\n"),
    "null": write("null\n"),
    "half a surrogate pair": write('{"run_id": "\\ud800"}\n'),
    "lists where objects belong": write(
        '{"config": [], "dataset": [], "base": [], "trained": [], "identity": [], "files": []}\n'
    ),
    "lists deeper down": write(
        '{"status": ["completed"], "config": {"lora": []}, "dataset": {"train": []}, "files": {"a": []}}\n'
    ),
    "numbers where texts belong": write(
        '{"status": 1, "dataset": {"train": {"sha256": 1}}, "files": {"a": 1}}\n'
    ),
}


@contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Callable[[str], None]]:
    """A disk of this size, such as "600k"; yields a function that gives it another size."""
    folder.mkdir(parents=True)
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", folder], check=False)
    if done.returncode:
        pytest.skip("mounting a small disk is not allowed here")

    def resize(size: str) -> None:
        subprocess.run(["mount", "-o", f"remount,size={size}", folder], check=True)

    try:
        yield resize
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def fill(disk: Path) -> Path:
    """Fill a disk to its last byte; the file that does it."""
    filler = disk / "filler"
    with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
        for size in (2**16, 1):
            with contextlib.suppress(OSError):
                while file.write(b"x" * size) == size:
                    pass
    return filler


def one_line(log: str) -> str:
    """The error of a command that ended with exit code 2: one line and no trace."""
    assert "Traceback" not in log, log
    lines = [line for line in log.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, log
    return lines[0]


def try_damage(
    sound: Path,
    new_folder: Callable[[], Path],
    trials: list[tuple[str, str]],
    start: Callable[[Path], object],
    check: Callable[[Path], None],
    place: Callable[[Path, str], str] = lambda folder, name: str(folder),
    more: dict[str, Callable[[Path], object]] | None = None,
) -> Counter[str]:
    """Do each fault to each file of a copy of `sound`, give the command again, and count the ends.

    Args:
      trials: file below `sound`, and the name of a fault.
      start: begins the command over a folder; its result has `wait() -> exit code` and `log() -> text`.
      check: raises where what the command left is not what an undisturbed one leaves.
      place: what the one line must name, of a folder and a file below it.
      more: further faults, by their names.
    """
    ends: Counter[str] = Counter()
    faults = DAMAGE | JSON_DAMAGE | (more or {})
    for name, fault in trials:
        folder = new_folder()
        shutil.copytree(sound, folder, symlinks=True, dirs_exist_ok=True)
        faults[fault](folder / name)
        run = start(folder)
        code = run.wait()
        assert code in (0, 2), f"{fault} in {name}: exit code {code}\n{run.log()}"
        if code == 2:
            message = one_line(run.log())
            ends["one line"] += 1
            assert place(folder, name) in message, f"{fault} in {name}: the line names no place: {message}"
        else:
            check(folder)
            ends["made good"] += 1
        shutil.rmtree(folder)
    return ends
