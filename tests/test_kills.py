"""Whatever stops a run, and however often: the finished run is that of an undisturbed one, byte for byte."""

from __future__ import annotations

import random
import signal
import time
from collections import Counter
from pathlib import Path

import kills
import pytest

SEED = 20260420


class Lab:
    """Runs of one small job, in folders of their own, and what an undisturbed one gives."""

    def __init__(self, folder: Path):
        self.folder, self.options = folder, kills.options(folder / "model")
        self.context = kills.server()
        self.kills: Counter[str] = Counter()
        self.resumed: list[float] = []
        self._folders = 0
        whole = self.start(self.new_folder())
        assert whole.wait() == 0, whole.log()
        self.expected = kills.outcome(whole.path)

    def new_folder(self) -> Path:
        self._folders += 1
        return self.folder / f"run-{self._folders}"

    def start(self, folder: Path, moment: str | None = None, nth: int = 1) -> kills.Run:
        return kills.Run(self.context, self.options, folder, moment, nth)

    def kill_at(self, folder: Path, moment: str, nth: int = 1) -> None:
        """Start or resume, and die at this moment."""
        run = self.start(folder, moment, nth)
        code = run.wait()
        assert code == -signal.SIGKILL, f"'{moment}' never came (exit code {code}):\n{run.log()}"
        self.kills[f"at '{moment}'"] += 1

    def finish(self, folder: Path) -> None:
        """Resume to the end, and compare."""
        run = self.start(folder)
        if (seconds := run.wait_for_steps()) is not None:
            self.resumed.append(seconds)
        assert run.wait() == 0, run.log()
        self.compare(run)

    def compare(self, run: kills.Run) -> None:
        different = kills.differing(kills.outcome(run.path), self.expected)
        assert not different, f"{', '.join(different)} in {run.path}; the kills were {dict(self.kills)}"

    def report(self, capsys) -> None:
        with capsys.disabled():
            print(f"\n{self.kills.total()} kills survived:")
            for name, count in sorted(self.kills.items()):
                print(f"  {count:3} {name}")
            if self.resumed:
                print(f"resumed in {sum(self.resumed) / len(self.resumed):.1f} s on average")


@pytest.fixture(scope="module")
def lab(tmp_path_factory) -> Lab:
    return Lab(tmp_path_factory.mktemp("kills"))


def random_signals(lab: Lab, number: int, send) -> int:
    """Disturb runs `number` times at random times, each run until it is finished; returns how many runs."""
    choose = random.Random(SEED)
    runs, sent = 0, 0
    while sent < number:
        folder = lab.new_folder()
        runs += 1
        while sent < number:
            run = lab.start(folder)
            if choose.random() < 0.75:  # somewhere in its steps, saves, validations and its end
                if (seconds := run.wait_for_steps()) is not None and sent:
                    lab.resumed.append(seconds)
                time.sleep(choose.uniform(0, 2))
            else:  # anywhere
                time.sleep(choose.uniform(0, 4))
            if not send(run, choose):
                break
            sent += 1
        lab.finish(folder) if not (run.path / "summary.json").is_file() else lab.compare(run)
    return runs


def kill(lab: Lab):
    def send(run: kills.Run, choose: random.Random) -> bool:
        run.send(signal.SIGKILL)
        code = run.wait()
        assert code in (0, -signal.SIGKILL), run.log()
        if code == 0:  # it was finished already
            return False
        lab.kills[f"at random: {run.phase()}"] += 1
        return not (run.path / "summary.json").is_file()

    return send


def ask_to_stop(codes: Counter):
    """SIGTERM, alone or followed by another signal."""

    def send(run: kills.Run, choose: random.Random) -> bool:
        begin = time.monotonic()
        run.send(signal.SIGTERM)
        if choose.random() < 0.5:
            time.sleep(choose.uniform(0, 0.3))
            run.send(choose.choice([signal.SIGTERM, signal.SIGINT]))
        code = run.wait()
        assert time.monotonic() - begin < 26, f"longer than the grace:\n{run.log()}"
        # Before the entry point has taken the signals over, SIGTERM and Ctrl-C do what they always do.
        early = (-signal.SIGTERM, -signal.SIGINT, 1) if not run.path.exists() else ()
        assert code in (0, 75, *early), f"exit code {code}:\n{run.log()}"
        codes[code] += 1
        return not (run.path / "summary.json").is_file()

    return send


IN_THE_LOOP = (
    "a step computed, not yet recorded",
    "half a metrics line",
    "in the middle of a validation",
    "checkpoint begun",
    "arrays on their way to the disk",
    "arrays written, not hashed",
    "half a hash list",
    "hashed, not published",
    "published, older ones not deleted",
)


def test_six_kills_leave_no_trace(lab, capsys):
    folder = lab.new_folder()
    for moment in (
        "half a metrics line",
        "in the middle of a validation",
        "arrays on their way to the disk",
        "hashed, not published",
        "an older checkpoint half deleted",
        "half an adapter exported",
    ):
        lab.kill_at(folder, moment)
    lab.finish(folder)
    lab.report(capsys)


@pytest.mark.slow
def test_a_kill_at_each_named_moment_leaves_no_trace(lab, capsys):
    folder = lab.new_folder()
    for moment in kills.MOMENTS:
        lab.kill_at(folder, moment)
    lab.finish(folder)
    folder = lab.new_folder()
    for moment in IN_THE_LOOP:
        lab.kill_at(folder, moment, nth=3)
    lab.finish(folder)
    lab.report(capsys)
    assert len([name for name in lab.kills if name.startswith("at '")]) == len(kills.MOMENTS)


@pytest.mark.slow
def test_forty_kills_at_random_moments_leave_no_trace(lab, capsys):
    before = lab.kills.total()
    runs = random_signals(lab, 40, kill(lab))
    lab.report(capsys)
    assert lab.kills.total() - before >= 40
    assert runs >= 4


@pytest.mark.slow
def test_sigterm_at_random_moments_exits_with_75_within_the_grace_and_leaves_no_trace(lab, capsys):
    codes: Counter[int] = Counter()
    random_signals(lab, 12, ask_to_stop(codes))
    with capsys.disabled():
        print(f"\nexit codes after SIGTERM: {dict(codes)}")
    assert codes[75] >= 8
