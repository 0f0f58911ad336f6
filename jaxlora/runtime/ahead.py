"""A jitted function's programs, compiled in threads before they are needed.

    step = Ahead(train_step, lambda state, frozen, batch, rate: batch["tokens"].shape)
    step.start(state, frozen, batch, rate)       # abstract arrays will do: nothing needs to be loaded yet
    state, metrics = step(state, frozen, batch, rate)

A jitted function compiles when it is first given a shape, and the devices wait; this way they wait for the
first program alone. What is computed is the same: each program is the one that the function would have
compiled.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Hashable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import nullcontext
from typing import Any

import jax

COMPILES_AHEAD = ("gpu",)  # where compiling takes long and the host has cores to spare
MOST = 32  # programs compiled ahead: those of further shapes are compiled when they come


def compiles_ahead(platform: str | None = None) -> bool:
    """Whether it is worth the threads on devices of this platform; None: on this machine's."""
    return (platform or jax.default_backend()) in COMPILES_AHEAD


class Ahead:
    """A jitted function that may have been compiled already; one a function, for all threads.

    All share the threads: programs are compiled in the order in which they are asked for.
    """

    _pool = ThreadPoolExecutor(max(1, min(8, (os.cpu_count() or 2) // 2)), "compiling")
    _tracing = threading.Lock()  # Python traces one at a time; what is asked for first comes first
    _alone: Future | None = None  # what programs that are asked for now wait for

    def __init__(self, function: Any, key: Callable[..., Hashable], static: tuple[int, ...] = ()):
        """`key` tells from the arguments which program they need; `static` are the jitted function's own."""
        self._function, self._key, self._static = function, key, static
        self._made: dict[Hashable, Future[Callable]] = {}

    def start(self, *arguments: Any, alone: bool = False) -> None:
        """Compile for arguments like these, in a thread, unless that was begun before.

        Args:
          alone: programs that are asked for later, of any function, wait until this one is there, which
            comes the sooner.
        """
        key = self._key(*arguments)
        if key not in self._made and len(self._made) < MOST:
            like = [x if i in self._static else _abstract(x) for i, x in enumerate(arguments)]
            mesh = jax.sharding.get_mesh()
            context = None if mesh.empty else mesh
            self._made[key] = self._pool.submit(self._compile, context, like, Ahead._alone)
            if alone:
                Ahead._alone = self._made[key]

    def _compile(self, mesh: Any, arguments: list, after: Future | None) -> Callable:
        if after is not None:
            wait([after])
        with nullcontext() if mesh is None else jax.set_mesh(mesh):  # the context of a thread is its own
            with self._tracing:
                lowered = self._function.lower(*arguments)
            return lowered.compile()

    def __call__(self, *arguments: Any) -> Any:
        """The result; waits for its program where that is not ready, and raises what went wrong with it."""
        made = self._made.get(self._key(*arguments))
        if made is None:
            return self._function(*arguments)
        return made.result()(*(x for i, x in enumerate(arguments) if i not in self._static))

    def lower(self, *arguments: Any, **named: Any) -> Any:
        """The function lowered as by `jax.jit`, for whoever wants to look at a program."""
        return self._function.lower(*arguments, **named)

    def close(self) -> None:
        """Compile nothing that was not begun."""
        for made in self._made.values():
            made.cancel()
        if Ahead._alone in self._made.values():
            Ahead._alone = None  # or its program would stay


def _abstract(tree: Any) -> Any:
    """What a program needs to know of its arguments; an array that may lie anywhere may lie anywhere."""

    def abstract(x: Any) -> jax.ShapeDtypeStruct:
        anywhere = not hasattr(x, "sharding") or (isinstance(x, jax.Array) and not x.committed)
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=None if anywhere else x.sharding)

    return jax.tree.map(abstract, tree)
