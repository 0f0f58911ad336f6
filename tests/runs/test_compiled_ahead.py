"""A run that compiles ahead of its steps learns what any run learns, from few buffer lengths at first."""

from __future__ import annotations

import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

from jaxlora.cli import load_config
from jaxlora.config import LoraConfig, TrainConfig
from jaxlora.data.batches import step_batch
from jaxlora.models.decoder import ModelSpec
from jaxlora.models.families import published_config
from jaxlora.runtime import ahead
from jaxlora.train import job as jobs
from jaxlora.train import loop
from jaxlora.train.job import prepare

CACHE = (
    "jax_compilation_cache_dir",
    "jax_persistent_cache_min_compile_time_secs",
    "jax_persistent_cache_min_entry_size_bytes",
)
FIELDS = {
    "data.train_rows": "36",
    "data.validation_rows": "4",
    "data.shuffle": "true",
    "train.layout": "packed",
    "train.epochs": "1",
    "train.batch_rows": "3",
    "train.buffer_sizes": "3",
    "train.validation_batch_rows": "4",
    "train.startup_check": "false",
}


def trained(repository, folder) -> tuple[loop.Run, list[dict]]:
    """A whole run, and the records of its metrics."""
    job = prepare(load_config(repository / "configs" / "tiny.py", FIELDS | {"results_dir": str(folder)}))
    seen = []
    make_run = loop.Run.__init__

    def noting(self, *arguments):
        make_run(self, *arguments)
        seen.append(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop.Run, "__init__", noting)
        loop.train(job)
    lines = (job.config.run_dir / "metrics.jsonl").read_text().splitlines()
    return seen[0], [json.loads(line) for line in lines]


def test_it_learns_the_same_and_compiles_nothing_on_the_way(repository, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(ahead, "COMPILES_AHEAD", ("cpu",))
        patch.setattr(jobs, "buffer_lengths", lambda train, *_: (train, ((2, 1), (5, 2), (7, 3))))
        run, found = trained(repository, tmp_path / "ahead")
    for programs in (run.programs, run.eval_programs):
        assert programs._function._cache_size() == 0  # every call had its program

    _, expected = trained(repository, tmp_path / "as it comes")
    assert [record["split"] for record in found] == [record["split"] for record in expected]
    losses = [[record["loss"] for record in records] for records in (found, expected)]
    np.testing.assert_allclose(*losses, rtol=2e-5)

    layout = run.job.train_layout
    lengths = [
        step_batch(run.job.train_rows, run.job.plan.rows_of_step, layout, step)["tokens"].shape[-1]
        for step in range(1, run.job.plan.total_steps + 1)
    ]
    assert len(layout.sizes) == 3
    assert [last for last, _ in layout.early] == [2, 5]
    assert (len(set(lengths[:2])), len(set(lengths[:5]))) == (1, 2)
    assert len(set(lengths)) == 3
    assert {shape[-1] for shape in run.programs._made} == set(lengths)


def test_of_the_programs_only_some_are_written_to_the_cache(tmp_path):
    """Writing one stops Python, and with it the training, for a second."""
    before = {name: getattr(jax.config, name) for name in CACHE}
    try:
        for name, value in zip(CACHE, (str(tmp_path), 0.0, -1), strict=True):
            jax.config.update(name, value)
        compilation_cache.reset_cache()
        programs = ahead.Ahead(jax.jit(lambda x: jnp.sin(x) @ x.T), lambda x: x.shape)
        for rows, cached in ((3, True), (4, False), (5, True), (6, False)):
            programs.start(jnp.ones((rows, 2)), cached=cached)
        for rows in (3, 4, 5, 6):
            x = jnp.full((rows, 2), 0.5)
            np.testing.assert_allclose(programs(x), jnp.sin(x) @ x.T, rtol=1e-6)
        written = [
            one.name
            for one in tmp_path.iterdir()
            if one.name.startswith("jit__lambda") and "atime" not in one.name
        ]
        assert len(written) == 2
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()


@pytest.mark.parametrize(
    ("platform", "tokens", "lengths", "stages"),
    [
        ("gpu", 17e6, 16, ((124, 1), (308, 8))),
        ("gpu", 2e6, 3, ((1047, 1), (2617, 8))),
        ("gpu", 1e5, 1, ((20930, 1), (52325, 8))),
        ("tpu", 17e6, 0, ()),
    ],
)
def test_a_long_run_on_gpus_is_worth_many_lengths(platform, tokens, lengths, stages):
    spec = ModelSpec(published_config("qwen3-8b"), LoraConfig())
    devices = SimpleNamespace(flat=[SimpleNamespace(platform=platform)])
    mesh = SimpleNamespace(devices=devices, size=1)
    train, found = jobs.buffer_lengths(TrainConfig(), spec, mesh, tokens, 6336)
    assert (train.buffer_sizes, found) == (lengths, stages)
    assert jobs.buffer_lengths(TrainConfig(buffer_sizes=4), spec, mesh, tokens, 6336)[0].buffer_sizes == 4


def test_what_is_asked_for_alone_is_there_before_anything_else_is_compiled():
    order = []

    class Jitted:
        def __init__(self, name):
            self.name = name

        def lower(self, x):
            order.append(("begin", self.name))
            return self

        def compile(self):
            order.append(("end", self.name))
            return lambda x: self.name

    first, other = (ahead.Ahead(Jitted(name), lambda x: x.shape) for name in ("first", "other"))
    x = np.zeros(3)
    first.start(x, alone=True)
    for n in (3, 4):
        other.start(np.zeros(n))
    assert (other(x), first(x), other(np.zeros(4))) == ("other", "first", "other")
    assert order[:2] == [("begin", "first"), ("end", "first")]
