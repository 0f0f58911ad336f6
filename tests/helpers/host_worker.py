"""What the processes of test_hosts.py run: one of the functions below, named on the command line."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

import jax
import numpy as np

from jaxlora.config import MeshConfig
from jaxlora.runtime import hosts
from jaxlora.runtime.errors import UserError, run_main
from jaxlora.sharding import make_mesh, named


def report(**values) -> None:
    """One JSON line a process, whole even where all write to one terminal."""
    os.write(1, (json.dumps(values) + "\n").encode())


def talk(_folder: Path) -> None:
    """Each call that hosts make to one another, once."""
    me, n = jax.process_index(), jax.process_count()
    mesh = make_mesh(MeshConfig(fsdp=-1))
    values = np.arange(8 * n, dtype=np.float32).reshape(2 * n, 4)
    split = jax.make_array_from_callback(
        values.shape, named(mesh, ("batch", None), values.shape), lambda index: values[index]
    )
    whole = hosts.whole({"split": split, "same": jax.numpy.ones(3), "number": 5})
    report(
        main=hosts.is_main(),
        asked_by_the_last=hosts.agree(me == n - 1),
        asked_by_none=hosts.agree(False),
        said=hosts.broadcast({"from": me}),
        whole=bool(np.array_equal(whole["split"], values) and whole["same"].sum() == 3),
    )
    hosts.barrier("the end")


def load(folder: Path) -> None:
    """The base as several hosts read it, compared with reading all of it here."""
    from safetensors.numpy import load_file

    from jaxlora.checkpoints import tensors
    from jaxlora.checkpoints.base import load_base

    spec = _spec(folder)
    n_read = 0
    original = tensors.StoredTensor.rows

    def rows(self, start: int, stop: int):
        nonlocal n_read
        part = original(self, start, stop)
        n_read += part.nbytes
        return part

    tensors.StoredTensor.rows = rows  # type: ignore[method-assign]
    mesh = make_mesh(MeshConfig(fsdp=-1))
    with jax.set_mesh(mesh):
        loaded = hosts.whole(load_base(folder, spec, mesh))
    stored = load_file(folder / "model.safetensors")
    same = [np.array_equal(loaded["embed_tokens"]["weight"], stored["model.embed_tokens.weight"])]
    for i in range(spec.config.num_hidden_layers):
        down = loaded["layers"]["mlp"]["down_proj"]["weight"][i]
        same.append(np.array_equal(down, stored[f"model.layers.{i}.mlp.down_proj.weight"]))
    report(share=n_read / sum(x.nbytes for x in stored.values()), same=all(same))


def draw(folder: Path) -> None:
    """A random base as several hosts draw it, compared with drawing all of it here."""
    from jaxlora.checkpoints.base import random_base

    spec = _spec(folder)
    bases = []
    for mesh in (make_mesh(MeshConfig(fsdp=-1)), make_mesh(MeshConfig(fsdp=1), jax.local_devices()[:1])):
        with jax.set_mesh(mesh):
            bases.append(hosts.whole(random_base(spec, 7, mesh)))
    report(same=all(jax.tree.leaves(jax.tree.map(np.array_equal, *bases))))


def _spec(folder: Path):
    from jaxlora.models.decoder import ModelSpec
    from jaxlora.models.families import load_model_config

    return ModelSpec(load_model_config(folder), None, "float32", scan=True)


def refuse(_folder: Path) -> None:
    """Process 1 alone finds a mistake; the others are in a collective that would never return."""
    if jax.process_index() == 1:
        raise UserError("this host has no  such\nfile")
    _never_return()


def crash(_folder: Path) -> None:
    """As `refuse`, with an error that nobody expected, in process 0."""
    if jax.process_index() == 0:
        raise ZeroDivisionError("seven by zero")
    _never_return()


def die(_folder: Path) -> None:
    """Process 1 is killed without a word."""
    hosts.whole(_ones())
    if jax.process_index() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    _never_return()


def stay_away(_folder: Path) -> None:
    """Process 1 never comes to a barrier, and does not fail either."""
    if jax.process_index() == 1:
        time.sleep(60)
    hosts.barrier("saved", seconds=1)


def share(folder: Path) -> None:
    """Each process has a results folder of its own."""
    hosts.check_shared(folder, seconds=20)  # one that all see
    hosts.check_shared(folder / str(jax.process_index()), seconds=1)


def differ(_folder: Path) -> None:
    """Process 1 was given another seed."""
    hosts.check_same({"rank": 8, "seed": 3}, "results/run")
    hosts.check_same({"rank": 8, "seed": jax.process_index()}, "results/run")


def _ones() -> jax.Array:
    """One on each device."""
    shape = (jax.device_count(),)
    sharding = named(make_mesh(MeshConfig(fsdp=-1)), ("embed",), shape)
    return jax.make_array_from_callback(shape, sharding, lambda _: np.ones(1))


def _never_return() -> None:
    print(jax.jit(jax.numpy.sum)(_ones()))
    hosts.barrier("never")


def main() -> None:
    hosts.CONNECT_SECONDS = int(os.environ.get("CONNECT_SECONDS", hosts.CONNECT_SECONDS))
    hosts.start()
    scenario = {f.__name__: f for f in (talk, load, draw, refuse, crash, die, stay_away, share, differ)}[
        sys.argv[1]
    ]
    scenario(Path(sys.argv[2]))


if __name__ == "__main__":
    run_main(main)
