"""A step's programs for all buffer lengths, compiled in threads before batches of these lengths come.

    with StepPrograms(train_step, mesh) as step:
        step.start(state, frozen, batch, rate)       # abstract arrays will do: nothing needs to be loaded yet
        state, metrics = step(state, frozen, batch, rate)

A jitted function compiles when it is first given a length, and the devices wait; this way they wait for the
first program alone, which is compiled while weights are read. What is computed is the same: each program is
the one that the function would have compiled.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
from jax.sharding import Mesh

MOST = 32  # programs compiled ahead: a run with more shapes compiles the others when they come


class StepPrograms:
    """A jitted step `(state, frozen, batch, rate)` that may have been compiled already."""

    def __init__(self, step: Any, mesh: Mesh):
        self._step, self._mesh = step, mesh
        self._made: dict[tuple[int, ...], Future[Callable]] = {}
        self._pool = ThreadPoolExecutor(max(1, min(8, (os.cpu_count() or 2) // 2)), "compiling")
        self._tracing = threading.Lock()  # Python traces one at a time; what is asked for first comes first

    def __enter__(self) -> StepPrograms:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    def start(self, *arguments: Any) -> None:
        """Compile for arguments of these shapes, in a thread, unless that was begun before."""
        shape = arguments[2]["tokens"].shape
        if shape not in self._made and len(self._made) < MOST:
            self._made[shape] = self._pool.submit(self._compile, jax.tree.map(_abstract, arguments))

    def _compile(self, arguments: tuple) -> Callable:
        with jax.set_mesh(self._mesh):  # the context of a thread is its own
            with self._tracing:
                lowered = self._step.lower(*arguments)
            return lowered.compile()

    def __call__(self, *arguments: Any) -> Any:
        """The step; waits for its program where that is not ready, and raises what went wrong with it."""
        made = self._made.get(arguments[2]["tokens"].shape)
        return (self._step if made is None else made.result())(*arguments)


def _abstract(x: Any) -> jax.ShapeDtypeStruct:
    """What a program needs to know of an argument; an array that may lie anywhere may lie anywhere."""
    anywhere = isinstance(x, jax.Array) and not x.committed
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=None if anywhere else x.sharding)
