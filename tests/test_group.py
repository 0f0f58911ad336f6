"""Runs trained together leave what each leaves alone, wherever they are stopped and however they go on."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from hf_models import make_checkpoint
from safetensors.numpy import load_file

from jaxlora.config import MeshConfig, RunConfig, load_config
from jaxlora.lora import init_lora
from jaxlora.runtime.errors import UserError
from jaxlora.runtime.signals import Interrupted, Stop
from jaxlora.sharding import make_mesh
from jaxlora.train import loop
from jaxlora.train.group import groups
from jaxlora.train.job import Job, prepare
from jaxlora.train.loop import Diverged, train, train_group
from jaxlora.train.member import load_frozen
from jaxlora.train.step import init_state, make_train_step

REPOSITORY = Path(__file__).resolve().parent.parent
TIMES = {"seconds", "tokens_per_second", "model_flops_utilisation", "peak_memory_bytes"}
STEPS = 6  # of every run here, with validations after 2, 4 and 6


@pytest.fixture(scope="module")
def first(tmp_path_factory) -> Job:
    """A small run: two layers, 24 rows, 4 a step."""
    folder = tmp_path_factory.mktemp("model")
    sizes = {"vocab_size": 1024, "hidden_size": 32, "num_hidden_layers": 2, "tie_word_embeddings": True}
    make_checkpoint(folder, initializer_range=0.05, **sizes)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(REPOSITORY / "jaxlora" / "embedded" / "base" / name, folder)
    fields = {
        "model.path": folder,
        "lora.condition": "attention_only",
        "data.train_rows": 24,
        "data.validation_rows": 10,
        "optim.peak_lr": 3e-3,
        "train.batch_rows": 4,
        "train.epochs": 1,
        "train.validation_every": 2,
        "train.validation_merge": 0,
        "train.validation_batch_rows": 4,
        "train.startup_check": False,
        "eval.after_training": False,
    }
    config = load_config(REPOSITORY / "configs" / "tiny.py", {k: str(v) for k, v in fields.items()})
    job = prepare(config)
    return replace(job, mesh=make_mesh(MeshConfig(), jax.devices()[:1]))


def jobs_in(folder: Path, first: Job, seeds: Sequence[int] = (0, 1), **optim: float) -> list[Job]:
    """Runs of these seeds; keywords set fields of `optim`."""

    def job(seed: int) -> Job:
        config = replace(first.config, results_dir=str(folder), seed=seed)
        return with_config(first, replace(config, optim=replace(config.optim, **optim)))

    return [job(seed) for seed in seeds]


def with_config(job: Job, config: RunConfig) -> Job:
    return replace(prepare(config, like=job), mesh=job.mesh)


@pytest.fixture(scope="module")
def alone(first, tmp_path_factory) -> Path:
    """The results folder of two lone runs."""
    folder = tmp_path_factory.mktemp("alone")
    for job in jobs_in(folder, first):
        train(job)
    return folder


@pytest.fixture(scope="module")
def together(first, tmp_path_factory) -> Path:
    """The results folder of the same two runs, trained together."""
    folder = tmp_path_factory.mktemp("together")
    train_group(jobs_in(folder, first))
    return folder


def records(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def adapter(run: Path) -> np.ndarray:
    tensors = load_file(run / "selected" / "adapter_model.safetensors")
    return np.concatenate([tensors[name].ravel() for name in sorted(tensors)])


def assert_same_run(ours: Path, theirs: Path) -> None:
    """The same files, the same records up to rounding, the same adapter."""
    files = [
        {path.name for path in (*run.iterdir(), *(run / "selected").iterdir())} for run in (ours, theirs)
    ]
    assert files[0] == files[1]
    curves = [len(list((run / "tensorboard").iterdir())) for run in (ours, theirs)]
    assert curves[0] == curves[1] > 0
    assert len(records(ours)) == len(records(theirs))
    for own, other in zip(records(ours), records(theirs), strict=True):
        assert list(own) == list(other)
        for name in set(own) - TIMES:
            close = pytest.approx(other[name], rel=1e-5) if isinstance(other[name], float) else other[name]
            assert own[name] == close, (own["step"], name)
    summaries = [json.loads((run / "summary.json").read_text()) for run in (ours, theirs)]
    assert summaries[0]["selected_step"] == summaries[1]["selected_step"]
    a, b = adapter(ours), adapter(theirs)
    assert np.linalg.norm(a - b) < 1e-5 * np.linalg.norm(b)


def runs(folder: Path) -> list[Path]:
    return [folder / f"tiny-attention_only-seed-{seed}" for seed in (0, 1)]


def test_each_of_a_group_leaves_what_its_lone_run_leaves(alone, together):
    for ours, theirs in zip(runs(together), runs(alone), strict=True):
        assert_same_run(ours, theirs)
    assert [checkpoints(run) for run in runs(together)] == [checkpoints(run) for run in runs(alone)]
    a, b = (adapter(run) for run in runs(together))
    assert np.linalg.norm(a - b) > 0.1 * np.linalg.norm(b)  # and they are two different runs


# --- Stopped and gone on ------------------------------------------------------------------------------------


def stopped_after(jobs: Sequence[Job], step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Train these runs together, and ask to stop as soon as this step has been dispatched."""
    stop = Stop()
    stop.signum = None
    add = loop.StepLog.add

    def ask(self, at, *rest):
        add(self, at, *rest)
        if at == step:
            stop.signum = signal.SIGTERM

    monkeypatch.setattr(loop.StepLog, "add", ask)
    monkeypatch.setattr(Stop, "_leave", lambda self, message: None)
    with pytest.raises(Interrupted, match=f"stopped at step {step}"):
        train_group(jobs, stop=stop)
    monkeypatch.undo()


def checkpoints(run: Path) -> list[int]:
    return sorted(int(path.name) for path in (run / "checkpoints").iterdir())


def test_a_group_that_is_stopped_saves_every_run_and_goes_on_to_the_same_bytes(
    first, together, tmp_path, monkeypatch
):
    stopped_after(jobs_in(tmp_path, first), 3, monkeypatch)
    assert [checkpoints(run) for run in runs(tmp_path)] == [[2, 3]] * 2
    train_group(jobs_in(tmp_path, first))
    for ours, theirs in zip(runs(tmp_path), runs(together), strict=True):
        assert adapter(ours).tobytes() == adapter(theirs).tobytes()
        assert_same_run(ours, theirs)


def test_members_go_on_alone_and_lone_runs_go_on_in_a_group(first, alone, tmp_path, monkeypatch):
    stopped_after(jobs_in(tmp_path, first), 3, monkeypatch)
    stopped_after(jobs_in(tmp_path, first, seeds=(0,)), 5, monkeypatch)
    taken = note_advances(monkeypatch)
    train_group(jobs_in(tmp_path, first))
    # The one at step 5 waits for the one at step 3, and then they go on together.
    assert taken == [(3, 5, [1]), (5, 6, [0, 1])]
    for ours, theirs in zip(runs(tmp_path), runs(alone), strict=True):
        assert_same_run(ours, theirs)


def note_advances(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int, list[int]]]:
    """From which step to which step which seeds train together, from now on."""
    taken = []
    advance = loop._advance

    def note(members, until, *rest):
        taken.append((members[0].step, until, [member.job.config.seed for member in members]))
        advance(members, until, *rest)

    monkeypatch.setattr(loop, "_advance", note)
    return taken


def test_a_kill_between_the_saves_of_two_members_leaves_no_trace(first, together, tmp_path, monkeypatch):
    stopped_after(jobs_in(tmp_path, first), 3, monkeypatch)
    shutil.rmtree(runs(tmp_path)[1] / "checkpoints" / "3")  # never written: it goes on from step 2
    taken = note_advances(monkeypatch)
    train_group(jobs_in(tmp_path, first))
    assert taken == [(2, STEPS, [0, 1])]
    for ours, theirs in zip(runs(tmp_path), runs(together), strict=True):
        assert adapter(ours).tobytes() == adapter(theirs).tobytes()


def test_a_group_whose_selected_checkpoint_is_damaged_computes_it_again(first, alone, tmp_path, monkeypatch):
    damage = loop.Member.finish

    def damaged(self, frozen):
        if self.job.config.seed == 1 and not self._again:
            file = next((self.run.path / "checkpoints" / str(STEPS) / "state").rglob("ocdbt.process_0/d/*"))
            file.write_bytes(b"\0" * file.stat().st_size)
        damage(self, frozen)

    monkeypatch.setattr(loop.Member, "finish", damaged)
    taken = note_advances(monkeypatch)
    train_group(jobs_in(tmp_path, first))
    assert taken == [(0, STEPS, [0, 1]), (STEPS - 2, STEPS, [1])]
    for ours, theirs in zip(runs(tmp_path), runs(alone), strict=True):
        assert_same_run(ours, theirs)


# --- One of them fails --------------------------------------------------------------------------------------


def test_a_member_whose_loss_is_not_finite_ends_alone(first, alone, tmp_path):
    jobs = jobs_in(tmp_path, first)
    jobs[1] = jobs_in(tmp_path, first, seeds=(1,), peak_lr=1e30)[0]
    results = train_group(jobs)
    assert isinstance(results[1], Diverged)
    failure = json.loads((runs(tmp_path)[1] / "failure.json").read_text())
    assert failure["error"].startswith("Diverged: step ")
    assert failure["step"] == results[1].step
    assert max((r["step"] for r in records(runs(tmp_path)[1])), default=0) < results[1].step
    assert not (runs(tmp_path)[1] / "summary.json").exists()
    assert_same_run(runs(tmp_path)[0], runs(alone)[0])


def test_an_error_that_stops_all_is_written_into_every_run_on_its_way(first, tmp_path, monkeypatch):
    def fail(*_):
        raise RuntimeError("the device is gone")

    monkeypatch.setattr(loop, "validate", fail)
    with pytest.raises(RuntimeError, match="the device is gone"):
        train_group(jobs_in(tmp_path, first))
    for run in runs(tmp_path):
        failure = json.loads((run / "failure.json").read_text())
        assert (failure["error"], failure["step"]) == ("RuntimeError: the device is gone", 2)


# --- Which runs make a group --------------------------------------------------------------------------------


def test_members_may_take_batches_of_different_sizes(first, alone, tmp_path):
    def larger(folder: Path) -> Job:  # 3 steps: it ends before the other, and validates at steps of its own
        (job,) = jobs_in(folder, first, seeds=(1,), peak_lr=1e-3)
        return with_config(first, replace(job.config, train=replace(job.config.train, batch_rows=8)))

    train_group([*jobs_in(tmp_path, first, seeds=(0,)), larger(tmp_path)])
    train(larger(tmp_path / "alone"))
    assert_same_run(runs(tmp_path)[0], runs(alone)[0])
    assert_same_run(runs(tmp_path)[1], runs(tmp_path / "alone")[1])


def test_runs_that_cannot_share_a_step_are_refused(first, tmp_path):
    one, other = jobs_in(tmp_path, first)
    other = replace(other, config=replace(other.config, data=replace(other.config.data, validation_rows=3)))
    with pytest.raises(UserError, match=r"seed-0 and .*seed-1 cannot be trained in one program"):
        train_group([one, other])
    with pytest.raises(UserError, match="cannot be trained in one program"):
        train_group([one, one])
    assert not list(tmp_path.iterdir())


def test_a_step_that_is_too_long_for_the_chip_is_found_before_the_first(first):
    spec, layout = first.spec, replace(first.train_layout, sizes=(64, 128))
    job = replace(first, train_layout=layout)
    state = init_state(init_lora(spec, 0), first.config.optim)
    group = SimpleNamespace(
        jobs=[job],
        state=state,
        rates=lambda _: np.float32(1e-3),
        batch=lambda _: layout.build(job.train_rows[:1]),
    )
    step = make_train_step(spec, first.config.optim, job.compute(layout))
    shapes = []

    class Watched:
        def __init__(self, error: str | None = None):
            self.error = error

        def lower(self, state, frozen, batch, rate):
            shapes.append(batch["tokens"].shape)
            if self.error:
                raise jax.errors.JaxRuntimeError(self.error)
            return step.lower(state, frozen, batch, rate)

    with jax.set_mesh(job.mesh):
        frozen = load_frozen(job)
        loop.check_longest(group, Watched(), frozen, 1)  # the real program takes what it is given
        assert {shape[2] for shape in shapes} == {128}
        full = Watched("RESOURCE_EXHAUSTED: Used 20.95G of 15.75G hbm. Exceeded hbm capacity by 5.20G.")
        assert not layout.packed
        with pytest.raises(UserError, match=r"512 tokens needs 5\.20 GiB more .*layout=packed or"):
            loop.check_longest(group, full, frozen, 1)
        group.jobs = [replace(job, train_layout=replace(layout, packed=True))]
        with pytest.raises(UserError, match=r"512 tokens needs 5\.20 GiB more .*max_buffer_tokens=64, which"):
            loop.check_longest(group, full, frozen, 1)
        with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
            loop.check_longest(group, Watched("INTERNAL: something else"), frozen, 1)


def test_runs_are_grouped_by_what_must_not_differ_and_shared_out_evenly(first, tmp_path):
    def sweep(**fields) -> list[Job]:
        lora = replace(first.config.lora, **fields)
        jobs = jobs_in(tmp_path, first, seeds=range(5))
        return [replace(job, config=replace(job.config, lora=lora)) for job in jobs]

    mixed = [job for pair in zip(sweep(condition="all_layer"), sweep(), strict=True) for job in pair]
    found = [[(j.config.lora.condition, j.config.seed) for j in group] for group in groups(mixed, 4)]
    assert found == [
        [("all_layer", 0), ("all_layer", 1)],
        [("all_layer", 2), ("all_layer", 3), ("all_layer", 4)],
        [("attention_only", 0), ("attention_only", 1)],
        [("attention_only", 2), ("attention_only", 3), ("attention_only", 4)],
    ]
    assert [len(group) for group in groups(sweep(), 1)] == [1] * 5
    assert [len(group) for group in groups(sweep(output_head=True), 4)] == [1] * 5
    rates = [jobs_in(tmp_path, first, seeds=(7,), peak_lr=rate)[0] for rate in (1e-4, 3e-4, 1e-3)]
    assert [len(group) for group in groups(rates, 3)] == [3]
