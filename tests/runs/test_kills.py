"""Whatever stops a run, and however often: the finished run is that of an undisturbed one, byte for byte."""

from __future__ import annotations

import json
import random
import shutil
import signal
import time
from collections import Counter

import pytest
from helpers import kills

SEED = 20260420


def random_signals(lab: kills.Lab, number: int, send) -> int:
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


def kill(lab: kills.Lab):
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


FIVE = (
    ("half a metrics line", 7),
    ("arrays on their way to the disk", 2),
    ("hashed, not published", 2),
    ("half an adapter exported", 1),  # or a shard of all weights
    ("exported, no summary", 1),
)


def five_kills(lab: kills.Lab, capsys) -> None:
    folder = lab.new_folder()
    for moment, nth in FIVE:
        lab.kill_at(folder, moment, nth=nth)
    lab.finish(folder)
    lab.report(capsys)


def test_a_run_of_all_weights_survives_five_kills(tmp_path, compiled, capsys):
    lab = kills.Lab(tmp_path, compiled, "--config.train.what=full", run_id="tiny-full-seed-0")
    names = {name for name in lab.expected if name.startswith("selected/")}
    assert names >= {
        "selected/model.safetensors.index.json",
        "selected/config.json",
        "selected/tokenizer.json",
    }
    hashed = json.loads(lab.expected["summary.json"])["sha256"]
    assert {*hashed} == names  # the summary has a hash of each
    five_kills(lab, capsys)


def test_so_does_one_with_weight_decay_and_clipping(tmp_path, compiled, capsys):
    lab = kills.Lab(tmp_path, compiled, "--config.optim.weight_decay=0.1", "--config.optim.clip_norm=1.0")
    five_kills(lab, capsys)


def test_so_does_one_that_starts_from_an_adapter(lab, tmp_path, compiled, capsys):
    start = shutil.copytree(lab.whole.path / "selected", tmp_path / "adapter")
    continued = kills.Lab(
        tmp_path, compiled, f"--config.lora.start={start}", f"--config.model.path={lab.folder / 'model'}"
    )
    assert (
        continued.expected["selected/adapter_model.safetensors"]
        != lab.expected["selected/adapter_model.safetensors"]
    )
    five_kills(continued, capsys)


@pytest.mark.slow
def test_a_kill_at_each_named_moment_leaves_no_trace(lab, capsys):
    moments = kills.RUN_MOMENTS
    before = lab.kills.copy()
    folder = lab.new_folder()
    for moment in moments:
        lab.kill_at(folder, moment)
    lab.finish(folder)
    for i in range(0, len(IN_THE_LOOP), 3):
        folder = lab.new_folder()
        for moment in IN_THE_LOOP[i : i + 3]:
            lab.kill_at(folder, moment, nth=3)
        lab.finish(folder)
    lab.report(capsys)
    assert {*(lab.kills - before)} == {f"at '{moment}'" for moment in moments}


@pytest.mark.slow
def test_forty_kills_at_random_moments_leave_no_trace(lab, capsys):
    before = lab.kills.total()
    runs = random_signals(lab, 40, kill(lab))
    lab.report(capsys)
    assert lab.kills.total() - before >= 40
    assert runs >= 2


@pytest.mark.slow
def test_sigterm_at_random_moments_exits_with_75_within_the_grace_and_leaves_no_trace(lab, capsys):
    codes: Counter[int] = Counter()
    random_signals(lab, 12, ask_to_stop(codes))
    with capsys.disabled():
        print(f"\nexit codes after SIGTERM: {dict(codes)}")
    assert codes[75] >= 8
