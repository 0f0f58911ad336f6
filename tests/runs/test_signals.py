"""Training in somebody else's program: in a thread, in a notebook, beside handlers that are there already."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading

import pytest
from helpers import kills

from jaxlora.cli import load_config
from jaxlora.runtime.signals import Interrupted, Stop, stop_signals
from jaxlora.train import loop
from jaxlora.train.job import Job, prepare
from jaxlora.train.loop import train


@pytest.fixture(scope="module")
def words(tmp_path_factory) -> dict[str, str]:
    """The fields of a small run."""
    _, _, *fields = kills.options(tmp_path_factory.mktemp("model"))
    return dict(word.removeprefix("--config.").split("=", 1) for word in fields)


@pytest.fixture
def job(words, repository, tmp_path) -> Job:
    fields = words | {"results_dir": str(tmp_path / "results"), "train.epochs": "1"}
    return prepare(load_config(repository / "configs" / "tiny.py", fields))


def during_step(monkeypatch, step: int, act) -> None:
    """Do something when the run has recorded this step."""
    original = loop.StepLog.add

    def add(self, number, metrics, rate):
        original(self, number, metrics, rate)
        if number == step:
            act()

    monkeypatch.setattr(loop.StepLog, "add", add)


def in_a_thread(call) -> list:
    """What `call` returned or raised in a thread."""
    found: list = []

    def run():
        try:
            found.append(call())
        except BaseException as error:
            found.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(240)
    assert not thread.is_alive()
    return found


def handlers() -> list:
    return [signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)]


def press(signum: int = signal.SIGINT) -> None:
    signal.raise_signal(signum)


class TestOutsideTheMainThread:
    def test_training_runs_to_its_end_and_says_a_word(self, job, capfd):
        (result,) = in_a_thread(lambda: train(job))
        assert result.step in job.plan.validation_steps
        assert "outside the main thread" in capfd.readouterr().err
        assert json.loads((job.config.run_dir / "summary.json").read_text())["status"] == "completed"

    def test_it_stops_when_its_caller_says_so_and_goes_on_later(self, job, monkeypatch):
        stop = Stop()
        during_step(monkeypatch, 3, lambda: setattr(stop, "signum", signal.SIGTERM))
        (stopped,) = in_a_thread(lambda: train(job, stop=stop))
        assert isinstance(stopped, Interrupted)
        assert str(stopped).startswith("stopped at step 3")
        assert (job.config.run_dir / "checkpoints" / "3").is_dir()
        monkeypatch.undo()
        assert train(job).step in job.plan.validation_steps

    def test_its_signals_are_left_alone(self):
        def body():
            with stop_signals() as stop:
                return stop.signum

        before = handlers()
        assert in_a_thread(body) == [None]
        assert handlers() == before


class TestInANotebook:
    """The main thread of a process that is not ours to end."""

    def test_the_first_ctrl_c_saves_and_stops(self, job, monkeypatch):
        before = handlers()
        during_step(monkeypatch, 3, press)
        with pytest.raises(Interrupted, match="stopped at step 3"):
            train(job)
        assert handlers() == before
        assert (job.config.run_dir / "checkpoints" / "3").is_dir()

    def test_the_second_one_does_what_it_always_does(self, job, monkeypatch):
        before = handlers()
        during_step(monkeypatch, 3, lambda: (press(), press()))
        with pytest.raises(KeyboardInterrupt):
            train(job)
        assert handlers() == before

    def test_while_there_is_nothing_to_save_so_does_the_first(self, job, monkeypatch):
        before = handlers()
        monkeypatch.setattr(loop, "load_frozen", lambda _: press())
        with pytest.raises(KeyboardInterrupt):
            train(job)
        assert handlers() == before

    def test_handlers_that_were_there_get_what_is_not_taken(self, monkeypatch):
        heard: list[int] = []
        before = signal.signal(signal.SIGTERM, lambda signum, _: heard.append(signum))
        try:
            with stop_signals(ends_process=False) as stop:
                press(signal.SIGTERM)
            assert heard == [signal.SIGTERM]
            with stop_signals(ends_process=False) as stop, stop.saving(1.0) as begin:
                begin()
                press(signal.SIGTERM)
                assert stop.signum == signal.SIGTERM
                assert heard == [signal.SIGTERM]
        finally:
            signal.signal(signal.SIGTERM, before)

    def test_a_signal_after_the_last_look_ends_nothing(self):
        with stop_signals(ends_process=False) as stop:
            with stop.saving(1.0) as begin:
                begin()
                press()
            assert stop.signum == signal.SIGINT  # `stop_signals()` would have ended the process by now


HELD_UP = """
import os, signal, time
from concurrent.futures import ThreadPoolExecutor
from jaxlora.runtime.errors import run_main
from jaxlora.runtime.signals import Interrupted, stop_signals

def train():
    with stop_signals() as stop, stop.saving(1.0) as begin:
        begin()
        ThreadPoolExecutor(1).submit(time.sleep, 600)
        os.kill(os.getpid(), signal.SIGTERM)
        while stop.signum is None:
            time.sleep(0.01)
        raise Interrupted(stop.signum, 3)

def main():
    try:
        train()
    except Interrupted as stopped:
        print(stopped)
        return stopped.exit_code

run_main(main)
"""


def test_a_thread_that_still_compiles_holds_no_process_up_beyond_its_grace_period():
    ended = subprocess.run([sys.executable, "-c", HELD_UP], capture_output=True, text=True, timeout=120)
    assert ended.returncode == 75
    assert ended.stdout == "stopped at step 3; the same command resumes\n"
    assert (
        ended.stderr.strip() == "stopping after this step; the run is saved and resumes with the same command"
    )
