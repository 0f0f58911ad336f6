"""The bounds on a chat template hold in every thread and under a limit of the shell, and are lifted again."""

from __future__ import annotations

import resource
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from jaxlora.data.limits import bounded

GIBIBYTE = 2**30


def spin(seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        pass


def in_thread(function):
    """What the function returns or raises in a thread that is not the main one."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function).result(timeout=60)


def too_slow() -> None:
    with bounded(0.3, GIBIBYTE):
        spin()


def too_large() -> None:
    with bounded(10, GIBIBYTE):
        bytearray(2 * GIBIBYTE)


@pytest.mark.parametrize("where", [lambda function: function(), in_thread], ids=["main", "thread"])
class TestEveryThread:
    def test_time(self, where):
        start = time.monotonic()
        with pytest.raises(TimeoutError, match=r"more than 0.3 s"):
            where(too_slow)
        assert time.monotonic() - start < 10

    def test_time_although_the_first_interruption_is_swallowed(self, where):
        def stubborn() -> None:
            with bounded(0.3, GIBIBYTE):
                try:
                    spin()
                except Exception:
                    spin()

        with pytest.raises(TimeoutError):
            where(stubborn)

    @pytest.mark.skipif(sys.platform != "linux", reason="memory is bounded on Linux")
    def test_memory(self, where):
        with pytest.raises(MemoryError):
            where(too_large)
        assert len(bytearray(2 * GIBIBYTE)) == 2 * GIBIBYTE

    def test_nothing_strikes_after_the_block(self, where):
        def short_blocks() -> int:
            done = 0
            for _ in range(30):
                with bounded(0.05, GIBIBYTE):
                    done += 1
                spin(0.02)
            spin(0.5)
            return done

        assert where(short_blocks) == 30
        assert not [
            thread for thread in threading.enumerate() if thread.name == "time limit" and sleepy(thread)
        ]


def sleepy(thread: threading.Thread) -> bool:
    thread.join(timeout=5)
    return thread.is_alive()


def test_waiting_for_another_thread_costs_no_time():
    def waiting() -> str:
        with bounded(0.5, GIBIBYTE):
            time.sleep(1.2)
            return "done"

    assert in_thread(waiting) == "done"


def test_many_threads_restore_the_limit_of_the_process():
    before = resource.getrlimit(resource.RLIMIT_AS)

    def block(_: int) -> None:
        with bounded(5, GIBIBYTE):
            time.sleep(0.01)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(block, range(40)))
    assert resource.getrlimit(resource.RLIMIT_AS) == before


@pytest.mark.skipif(sys.platform != "linux", reason="memory is bounded on Linux")
def test_memory_is_bounded_under_ulimit_too(repository):
    code = (
        "import resource; from jaxlora.data.limits import bounded\n"
        "before = resource.getrlimit(resource.RLIMIT_AS)\n"
        "try:\n    with bounded(10, 2**28): bytearray(2**29)\n    print('unbounded')\n"
        "except MemoryError: print('bounded')\n"
        "assert resource.getrlimit(resource.RLIMIT_AS) == before\n"
    )
    command = f'ulimit -S -v 8000000; exec {sys.executable} -c "$CODE"'
    done = subprocess.run(
        ["bash", "-c", command],
        env={"CODE": code, "PYTHONPATH": str(repository)},
        capture_output=True,
        text=True,
    )
    assert done.stdout == "bounded\n", done.stderr
