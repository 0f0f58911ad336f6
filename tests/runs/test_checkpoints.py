"""A checkpoint is published whole or not at all, believed only after its hashes, and never of another run."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.trials import DAMAGE, flip_a_bit

import jaxlora.checkpoints.run_state as module
from jaxlora.checkpoints.run_state import RunState, damage
from jaxlora.config import OptimConfig
from jaxlora.runtime.errors import UserError
from jaxlora.train.step import init_state

IDENTITY = {"seed": 0, "lora.rank": 8, "base": "abc", "dataset.train.sha256": "def"}


def state_of(step: int, size: int = 64):
    """A state that differs from step to step."""
    a = jax.random.normal(jax.random.key(step), (2, 4, size))
    state = init_state({"q_proj": {"lora_a": a, "lora_b": -a}}, OptimConfig())
    adam = state.opt_state[0]._replace(count=jnp.int32(step), nu=jax.tree.map(jnp.abs, state.trained))
    return state._replace(opt_state=(adam,))


def progress_of(step: int) -> dict:
    return {"step": step, "validations": [[step, 1 / 3]], "metrics_bytes": 100 * step}


def fill(folder: Path, steps, best: int | None = None, identity=IDENTITY) -> None:
    with RunState(folder, identity) as store:
        for step in steps:
            store.save(step, state_of(step), progress_of(step), best)


def save_and_wait(store: RunState, step: int, state) -> None:
    store.save(step, state, progress_of(step))
    store.wait()


def equal(a, b) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def restored(folder: Path, identity=IDENTITY, **options):
    with RunState(folder, identity) as store:
        return store.restore(state_of(0), **options)


def files_of(checkpoint: Path) -> list[Path]:
    return sorted(path for path in checkpoint.rglob("*") if path.is_file())


FAULTS = {name: DAMAGE[name] for name in ("a flipped bit", "a truncation", "a missing file")}


def wait_until(condition, seconds: float = 60) -> bool:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    return condition()


class TestWhatIsKept:
    def test_what_was_saved_comes_back_to_the_bit(self, tmp_path):
        fill(tmp_path, [3])
        found = restored(tmp_path)
        assert (found.step, found.progress["validations"]) == (3, [[3, 1 / 3]])
        assert equal(found.state, state_of(3))

    def test_the_last_two_and_the_best_are_kept(self, tmp_path):
        fill(tmp_path, [2, 4, 6, 8, 10], best=4)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["10", "4", "8"]

    def test_nothing_is_restored_where_nothing_was_published(self, tmp_path):
        (tmp_path / ".writing-4").mkdir()
        (tmp_path / ".writing-4" / "half").touch()
        assert restored(tmp_path) is None
        fill(tmp_path, [5])
        assert [path.name for path in tmp_path.iterdir()] == ["5"]

    def test_a_step_saved_again_replaces_the_one_before(self, tmp_path):
        fill(tmp_path, [2])
        with RunState(tmp_path, IDENTITY) as store:
            store.save(2, state_of(2), progress_of(2) | {"validations": []})
        assert restored(tmp_path).progress["validations"] == []


class TestAsynchronousSaving:
    def test_the_step_goes_on_while_a_checkpoint_is_hashed_and_the_end_waits_for_it(
        self, tmp_path, monkeypatch
    ):
        go_on, original = threading.Event(), module.hashes

        def slow(folder):
            assert go_on.wait(60)
            return original(folder)

        monkeypatch.setattr(module, "hashes", slow)
        with RunState(tmp_path, IDENTITY) as store:
            store.save(1, state_of(1), progress_of(1))
            store.check()
            assert not (tmp_path / "1").exists()  # save has returned before it is published
            threading.Timer(0.3, go_on.set).start()
        assert damage(tmp_path / "1") is None

    def test_what_is_saved_is_the_state_at_the_call(self, tmp_path):
        change = jax.jit(lambda tree: jax.tree.map(lambda x: x * 0, tree), donate_argnums=0)
        with RunState(tmp_path, IDENTITY) as store:
            state = state_of(1)
            store.save(1, state, progress_of(1))
            jax.block_until_ready(change(state))  # the next step takes the memory over
        assert equal(restored(tmp_path).state, state_of(1))

    def test_an_error_in_the_background_is_raised_at_the_next_look(self, tmp_path, monkeypatch):
        def broken(folder):
            raise OSError(errno.EIO, "Input/output error")

        with RunState(tmp_path, IDENTITY) as store:
            store.save(1, state_of(1), progress_of(1))
            store.wait()
            monkeypatch.setattr(module, "hashes", broken)
            store.save(2, state_of(2), progress_of(2))
            assert wait_until(store._pending.done)
            with pytest.raises(OSError, match="Input/output"):
                store.check()
        assert [path.name for path in tmp_path.iterdir()] == ["1"]

    def test_an_error_in_the_last_save_is_not_lost(self, tmp_path, monkeypatch):
        def broken(folder):
            raise OSError(errno.EIO, "Input/output error")

        monkeypatch.setattr(module, "hashes", broken)
        with pytest.raises(OSError, match="Input/output"):
            fill(tmp_path, [1])


class TestDamage:
    @pytest.fixture(scope="class")
    def sound(self, tmp_path_factory) -> Path:
        folder = tmp_path_factory.mktemp("sound")
        fill(folder, [2, 4])
        return folder

    def test_every_file_of_a_checkpoint_is_covered(self, sound):
        listed = json.loads((sound / "4" / "sha256.json").read_text())["files"]
        names = {path.relative_to(sound / "4").as_posix() for path in files_of(sound / "4")}
        assert names == {*listed, "sha256.json"}
        assert len(names) >= 8

    @pytest.mark.parametrize("fault", FAULTS)
    def test_a_fault_in_any_file_is_named(self, sound, tmp_path, fault, capsys):
        tried = 0
        for original in files_of(sound / "4"):
            shutil.copytree(sound / "4", tmp_path / "4", dirs_exist_ok=True)
            name = original.relative_to(sound / "4")
            FAULTS[fault](tmp_path / "4" / name)
            problem = damage(tmp_path / "4")
            assert problem, f"{fault} in {name} was not seen"
            assert str(name) in problem
            tried += 1
        with capsys.disabled():
            print(f"\n{fault}: seen in each of {tried} files")

    @pytest.mark.parametrize("fault", FAULTS)
    @pytest.mark.parametrize("kind", ["state/manifest.ocdbt", "progress.json", "sha256.json"])
    def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(
        self, sound, tmp_path, fault, kind, capfd
    ):
        shutil.copytree(sound, tmp_path, dirs_exist_ok=True)
        FAULTS[fault](tmp_path / "4" / kind)
        found = restored(tmp_path)
        assert found.step == 2
        assert equal(found.state, state_of(2))
        message = " ".join(capfd.readouterr().err.split())
        assert "skipping the checkpoint of step 4" in message
        assert kind in message

    def test_a_checkpoint_without_its_hash_list_is_never_believed(self, sound, tmp_path):
        shutil.copytree(sound / "4", tmp_path / "4")
        (tmp_path / "4" / "sha256.json").unlink()
        with pytest.raises(UserError, match=r"no checkpoint can be used: step 4 \(sha256.json is missing\)"):
            restored(tmp_path)

    def test_where_all_are_damaged_the_message_says_what_to_do(self, sound, tmp_path):
        shutil.copytree(sound, tmp_path, dirs_exist_ok=True)
        for step in ("2", "4"):
            flip_a_bit(tmp_path / step / "progress.json")
        with pytest.raises(UserError, match=r"step 4 .*step 2 .*--config.overwrite=true"):
            restored(tmp_path)

    def test_a_checkpoint_that_its_caller_cannot_use_is_passed_over(self, sound):
        def short(progress):
            return "metrics.jsonl has 250 bytes" if progress["metrics_bytes"] > 250 else None

        assert restored(sound, usable=short).step == 2

    def test_a_damaged_one_is_deleted_only_when_a_better_one_is_there(self, sound, tmp_path):
        shutil.copytree(sound, tmp_path, dirs_exist_ok=True)
        flip_a_bit(tmp_path / "4" / "progress.json")
        with RunState(tmp_path, IDENTITY) as store:
            assert store.restore(state_of(0)).step == 2
            assert (tmp_path / "4").exists()
            store.save(3, state_of(3), progress_of(3))
        assert sorted(path.name for path in tmp_path.iterdir()) == ["2", "3"]


def test_a_checkpoint_of_another_run_is_refused_with_the_fields_that_differ(tmp_path):
    fill(tmp_path, [2])
    other = IDENTITY | {"lora.rank": 16, "base": "xyz"}
    with pytest.raises(UserError, match=r"lora.rank: 8 then, 16 now; base: 'abc' then, 'xyz' now"):
        restored(tmp_path, identity=other)


class TestDiskFull:
    @contextmanager
    def small_disk(self, folder: Path, size: str):
        folder.mkdir()
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", folder], check=False)
        if done.returncode:
            pytest.skip("mounting a small disk is not allowed here")
        try:
            yield
        finally:
            subprocess.run(["umount", "-l", folder], check=True)

    @pytest.mark.parametrize("seen", ["beforehand", "while writing"])
    def test_a_full_disk_keeps_the_old_checkpoint_and_says_what_is_needed(self, tmp_path, monkeypatch, seen):
        disk = tmp_path / "disk"
        if seen == "while writing":
            monkeypatch.setattr(module.shutil, "disk_usage", lambda _: SimpleNamespace(free=10**9))
        with self.small_disk(disk, "600k"):
            fill(disk / "checkpoints", [1])
            big = state_of(2, size=50_000)
            with RunState(disk / "checkpoints", IDENTITY) as store, pytest.raises(UserError) as caught:
                save_and_wait(store, 2, big)
            message = str(caught.value)
            needed = sum(x.nbytes for x in jax.tree.leaves(big)) / 1e6
            assert "the disk is full" in message
            assert f"needs {needed:.1f} MB" in message
            assert "step 1 is intact" in message
            assert [path.name for path in (disk / "checkpoints").iterdir()] == ["1"]
            assert equal(restored(disk / "checkpoints").state, state_of(1))

    @pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
    def test_a_disk_that_fills_up_at_the_very_end_of_a_save_does_the_same(
        self, tmp_path, monkeypatch, number
    ):
        fill(tmp_path, [1])
        original = module.write_json_atomic

        def full(path, value):
            if path.name == "sha256.json":
                raise OSError(number, os.strerror(number))
            original(path, value)

        monkeypatch.setattr(module, "write_json_atomic", full)
        with pytest.raises(UserError, match=r"disk is full.*step 2 needs .* MB.*step 1 is intact"):
            fill(tmp_path, [2])
        assert [path.name for path in tmp_path.iterdir()] == ["1"]


class TestBeingAskedToStop:
    """`jaxlora.runtime.signals`, in processes of its own."""

    def ends(self, body: str, *signals: tuple[float, int]) -> tuple[int, str, float]:
        """Run `body` with an open `stop`, send signals after these seconds; exit code, errors, seconds."""
        script = (
            "import hashlib, time\nfrom jaxlora.runtime.signals import stop_signals\n"
            "with stop_signals() as stop:\n    print('ready', flush=True)\n" + textwrap.indent(body, "    ")
        )
        process = subprocess.Popen(
            [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=-1, text=True
        )
        assert process.stdout.readline() == "ready\n"
        begin = time.monotonic()
        for delay, signum in signals:
            time.sleep(max(0, begin + delay - time.monotonic()))
            process.send_signal(signum)
        _, errors = process.communicate(timeout=60)
        return process.returncode, errors, time.monotonic() - begin

    COMPILING = "hashlib.pbkdf2_hmac('sha256', b'', b'', 10**8)\n"  # no Python code runs for half a minute

    def test_sigterm_ends_a_process_that_has_nothing_to_save_at_once(self):
        code, errors, seconds = self.ends(self.COMPILING, (0.2, signal.SIGTERM))
        assert code == 75
        assert seconds < 10
        assert "the same command resumes" in errors

    def test_ctrl_c_does_so_with_its_own_code(self):
        assert self.ends(self.COMPILING, (0.2, signal.SIGINT))[0] == 130

    def test_the_caller_saves_when_there_is_something_to_save(self):
        body = """
            with stop.saving(20) as begin:
                begin()
                while stop.signum is None: time.sleep(0.01)
                time.sleep(0.5); print('saved', flush=True)
                raise SystemExit(75)
            """
        body = textwrap.dedent(body)
        assert self.ends(body, (0.1, signal.SIGTERM), (0.3, signal.SIGTERM))[0] == 75

    def test_the_grace_ends_a_save_that_takes_too_long(self):
        body = f"with stop.saving(1.0) as begin:\n    begin()\n    {self.COMPILING}"
        code, errors, seconds = self.ends(body, (0.2, signal.SIGTERM), (0.4, signal.SIGTERM))
        assert code == 75
        assert 1.0 < seconds < 10
        assert "resumes from the checkpoint before" in errors

    def test_a_second_ctrl_c_does_not_wait(self):
        body = f"with stop.saving(60) as begin:\n    begin()\n    {self.COMPILING}"
        code, _, seconds = self.ends(body, (0.2, signal.SIGINT), (0.6, signal.SIGINT))
        assert code == 130
        assert seconds < 10

    def test_a_signal_after_the_last_look_is_not_forgotten(self):
        body = "with stop.saving(60) as begin:\n    begin()\n    time.sleep(1)\ntime.sleep(20)\n"
        code, _, seconds = self.ends(body, (0.2, signal.SIGTERM))
        assert code == 75
        assert seconds < 10
