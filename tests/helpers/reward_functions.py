"""Python functions as rewards: a right one, and one for everything that can go wrong in a worker process."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import time


def length(row: dict, text: str) -> float:
    """A tenth of the text's letters."""
    return len(text) / 10


def is_named(row: dict, text: str) -> bool:
    """Whether the text is the id of the problem or its answer, as the row has them."""
    return text in (row["id"], row["answer"])


def imports_jax(row: dict, text: str) -> bool:
    """Whether the worker has JAX, or anything that starts threads which a fork would lose."""
    return any(name in sys.modules for name in ("jax", "jaxlib", "torch"))


def process(row: dict, text: str) -> int:
    """The worker's process id, after a while."""
    time.sleep(0.01)
    return os.getpid()


def misbehaves(row: dict, text: str):
    """What the text names."""
    if text == "hangs in Python":
        time.sleep(1000)
    if text == "hangs in C":
        return 3 ** (3**18) % 7 + 9 ** (9**9)
    if text == "raises":
        raise RuntimeError("no")
    if text == "exits":
        sys.exit(0)
    if text == "dies":
        os._exit(3)
    if text == "crashes":
        ctypes.string_at(0)
    if text == "recurses":
        return misbehaves(row, text)
    if text == "prints":
        print("[[0, null]]", flush=True)
        os.write(1, b"[[0, null]]\n")
        return 1
    if text == "reads":
        return float(sys.stdin.read() == "")
    if text == "starts a process":
        subprocess.Popen(["sleep", row["seconds"]])
        time.sleep(1000)
    return {
        "NaN": float("nan"),
        "infinity": float("-inf"),
        "huge": 10**400,
        "absurd": -1e30,
        "text": "1.0",
        "None": None,
        "list": [1],
        "complex": 1j,
        "bool": True,
        "half": 0.5,
    }[text]
