"""Compile the programs of a jitted function in threads before they are needed.

    step = Ahead(train_step, lambda state, frozen, batch, rate: batch["tokens"].shape)
    step.start(state, frozen, batch, rate)       # abstract arrays suffice: nothing needs to be loaded yet
    state, metrics = step(state, frozen, batch, rate)

A jitted function compiles when it first sees a shape, while the devices wait; this way they wait only for the
first program. The results are the same: each program is the one that the function would have compiled.
"""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Callable, Hashable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import jax

COMPILES_AHEAD = ("gpu",)  # platforms where compiling is slow and the host has cores to spare
MOST = 32  # programs compiled ahead; those for further shapes are compiled when needed


def compiles_ahead(platform: str | None = None) -> bool:
    """Whether compiling ahead is worthwhile on this platform; None: on this machine's."""
    return (platform or jax.default_backend()) in COMPILES_AHEAD


class Ahead:
    """A jitted function whose programs may have been compiled ahead; one per function, for all threads.

    All instances share the threads: programs are compiled in the order of their requests.
    """

    _pool = ThreadPoolExecutor(max(1, min(8, (os.cpu_count() or 2) // 2)), "compiling")
    _tracing = threading.Lock()  # Python traces one at a time, in the order of requests
    _alone: Future | None = None  # the program that newly requested ones wait for

    def __init__(self, function: Any, key: Callable[..., Hashable], static: tuple[int, ...] = ()):
        """`key` maps arguments to the program they need; `static`: indices of the jit's static arguments."""
        self._function, self._key, self._static = function, key, static
        self._made: dict[Hashable, Future[Callable]] = {}

    def start(self, *arguments: Any, alone: bool = False, cached: bool = True) -> None:
        """Compile for arguments like these in a thread, unless already started.

        Args:
          alone: programs requested later, of any function, wait until this one is compiled, so that it is
            ready sooner.
          cached: write the program to the compilation cache. While it is made into bytes no Python runs: on a
            GPU 1.2 s for 36 layers, in which training gets no further.
        """
        key = self._key(*arguments)
        if key not in self._made and len(self._made) < MOST:
            like = [x if i in self._static else _abstract(x) for i, x in enumerate(arguments)]
            mesh = jax.sharding.get_mesh()
            context = None if mesh.empty else mesh
            self._made[key] = self._pool.submit(self._compile, context, like, Ahead._alone, cached)
            if alone:
                Ahead._alone = self._made[key]

    def _compile(self, mesh: Any, arguments: list, after: Future | None, cached: bool) -> Callable:
        if after is not None:
            wait([after])
        with nullcontext() if mesh is None else jax.set_mesh(mesh):  # a thread has its own context
            with self._tracing:
                lowered = self._function.lower(*arguments)
            with nullcontext() if cached else _uncached():
                return lowered.compile()

    def __call__(self, *arguments: Any) -> Any:
        """Call the function; waits until its program is ready, and raises its compilation error, if any."""
        made = self._made.get(self._key(*arguments))
        if made is None:
            return self._function(*arguments)
        return made.result()(*(x for i, x in enumerate(arguments) if i not in self._static))

    def lower(self, *arguments: Any, **named: Any) -> Any:
        """Lower the function as with `jax.jit`, for inspecting its program."""
        return self._function.lower(*arguments, **named)

    def close(self) -> None:
        """Cancel all compilations not yet started."""
        for made in self._made.values():
            made.cancel()
        if Ahead._alone in self._made.values():
            Ahead._alone = None  # otherwise its program would stay in memory


def _uncached() -> AbstractContextManager:
    """Nothing that this thread compiles inside is written to the compilation cache."""
    try:  # JAX has no public setting for one thread
        from jax._src.config import persistent_cache_min_compile_time_secs as cached_from_seconds
    except ImportError:
        return nullcontext()
    return cached_from_seconds(math.inf)


def _abstract(tree: Any) -> Any:
    """Shapes, dtypes and shardings of a program's arguments; uncommitted arrays have no sharding."""

    def abstract(x: Any) -> jax.ShapeDtypeStruct:
        anywhere = not hasattr(x, "sharding") or (isinstance(x, jax.Array) and not x.committed)
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=None if anywhere else x.sharding)

    return jax.tree.map(abstract, tree)
