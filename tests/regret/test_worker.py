"""An experiment from its first run to its page: claims, going on, what is refused, what a record holds."""

from __future__ import annotations

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlora.cli import load_config
from jaxlora.config import LoraConfig
from jaxlora.models.decoder import ModelSpec
from jaxlora.models.families import published_config
from jaxlora.regret import command, worker
from jaxlora.regret.norms import adapter_norms, change_norms, weight_norms
from jaxlora.regret.runs import HeldOut, Programs
from jaxlora.regret.worker import Lab, work
from jaxlora.runtime.errors import UserError
from jaxlora.train.loop import make_eval_step
from jaxlora.train.step import make_train_step

FIELDS = {
    "data.train_rows": "16",
    "data.validation_rows": "12",
    "train.batch_rows": "8",
    "train.validation_batch_rows": "5",
    "regret.arms": "full,all_layer+lm_head:2",
    "regret.rates": "3",
    "regret.extend": "0",
    "regret.repeats": "1",
    "regret.lora_rate": "2e-3",
    "regret.full_rate": "2e-4",
}


def config_of(folder, **fields):
    return load_config("regret/tiny", FIELDS | {"results_dir": str(folder)} | fields)


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A finished experiment: the lab, and its records."""
    lab = Lab(config_of(tmp_path_factory.mktemp("results")))
    work(lab)
    return lab, lab.folder.records()


@pytest.mark.slow
def test_an_experiment_makes_its_grid_and_its_repeats(done):
    lab, records = done
    assert lab.left() == []
    for cell in lab.cells:
        own = [record for record in records.values() if record["arm"] == cell.arm.label]
        assert sorted(record["rate"] for record in own if record["seed"] == 0) == pytest.approx(
            [cell.middle / 2, cell.middle, 2 * cell.middle]
        )
        best = min((r for r in own if r["seed"] == 0), key=lambda r: r["held_out"][-1][1])
        assert [r["rate"] for r in own if r["seed"] == 1] == [best["rate"]]


@pytest.mark.slow
def test_all_first_looks_are_at_the_same_base(done):
    _, records = done
    assert len({tuple(record["held_out"][0]) for record in records.values()}) == 1
    assert all(record["held_out"][-1][1] < record["held_out"][0][1] for record in records.values())


@pytest.mark.slow
def test_the_two_means_do_not_depend_on_how_rows_are_grouped(done):
    lab, records = done
    job = lab.first
    with jax.set_mesh(job.mesh):
        spec = lab._plain
        found = [HeldOut(one).look(spec, Programs(), {}, lab.base) for one in (job, _one_by_one(lab))]
    first = next(iter(records.values()))["held_out"][0]
    for token, row in found:
        assert token == pytest.approx(first[1], rel=1e-5)
        assert row == pytest.approx(first[2], rel=1e-5)
    assert abs(first[1] - first[2]) > 1e-4  # they are two definitions


def _one_by_one(lab):
    from jaxlora.train.job import prepare

    config = load_config(
        "regret/tiny", FIELDS | {"train.validation_batch_rows": "1", "train.layout": "packed"}
    )
    return prepare(config, like=None, gates=lab.first.gates)


@pytest.mark.slow
def test_a_run_is_that_of_the_step_taken_by_hand(done):
    lab, records = done
    record = next(r for r in records.values() if r["what"] == "lora" and r["seed"] == 0)
    run = next(
        worker.RunId(cell, record["place"], 0) for cell in lab.cells if cell.arm.label == record["arm"]
    )
    job = lab.job(run)
    with jax.set_mesh(job.mesh):
        state, losses = lab.state(job), []
        step = make_train_step(job.spec, job.config.optim, job.compute(job.train_layout))
        for number in range(1, job.plan.total_steps + 1):
            batch = job.train_layout.build([job.train_rows[i] for i in job.plan.rows_of_step(number)])
            state, metrics = step(state, lab.base, batch, np.float32(run.rate))
            losses.append(float(metrics["nll"]))
        total, weight = make_eval_step(job.spec, job.compute(job.validation_layout))(
            state.trained, lab.base, job.validation_layout.build(job.validation_rows[:5])
        )
        assert float(total) > 0
        assert float(weight) > 0
    assert losses == pytest.approx(record["train"]["nll"], rel=1e-5)
    assert record["train"]["weight"] == pytest.approx(
        [sum(job.train_rows[i].weights[1:].sum() for i in job.plan.rows_of_step(n)) for n in (1, 2)]
    )
    assert record["steps"] == 2


@pytest.mark.slow
def test_an_experiment_goes_on_from_its_small_files(done, tmp_path, monkeypatch):
    _, records = done
    there = tmp_path / "regret-tiny-regret" / "runs"
    there.mkdir(parents=True)
    lost = next(name for name, record in records.items() if record["seed"] == 0)
    for name, record in records.items():
        if name != lost:
            (there / f"{name}.json").write_text(json.dumps(record))
    other = Lab(config_of(tmp_path))
    assert [run.name for run in other.left()] == [lost]
    made = []
    monkeypatch.setattr(other, "make", lambda run: made.append(run.name) or records[run.name])
    with other.folder.claim(lost) as mine:
        assert mine
        assert worker._make_one(other, other.left()) is None  # another process holds it
    work(other)
    assert made == [lost]
    assert other.folder.records() == records


@pytest.mark.slow
def test_results_of_another_configuration_are_refused(done):
    lab, _ = done
    folder = lab.config.results_dir
    with pytest.raises(
        UserError, match=r"was made with another configuration: alpha: 32\.0 then, 16\.0"
    ) as error:
        Lab(config_of(folder, **{"lora.alpha": "16"})).left()
    assert "\n" not in str(error.value)


@pytest.mark.slow
def test_repeats_over_drawn_weights_belong_to_the_experiment(tmp_path):
    """A base that is drawn is that of the first seed for all runs."""
    fields = {"model.random_weights": "true", "regret.arms": "all_layer:2", "regret.rates": "1"}
    lab = Lab(config_of(tmp_path, **fields))
    work(lab)
    assert lab.left() == []
    assert sorted(record["seed"] for record in lab.folder.records().values()) == [0, 1]
    assert len({tuple(record["held_out"][0]) for record in lab.folder.records().values()}) == 1


@pytest.mark.slow
def test_a_damaged_result_is_named(done, tmp_path):
    _, records = done
    there = tmp_path / "regret-tiny-regret" / "runs"
    there.mkdir(parents=True)
    name, record = next(iter(records.items()))
    (there / f"{name}.json").write_text(json.dumps(record | {"held_out": [[1]]}))
    with pytest.raises(UserError, match="is not the result of a run; delete it"):
        Lab(config_of(tmp_path)).left()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"regret.arms": "full,all_layer"}, "config.regret.arms: 'all_layer' is not understood"),
        ({"name": "mine"}, "config.name is ignored"),
        ({"lora.start": "adapter"}, "config.lora.start: every arm starts from the base"),
        ({"lora.dropout": "0.1"}, "config.lora.dropout: arms are trained without"),
        ({"train.early_stopping": "2"}, "config.train.early_stopping: all runs of an arm take the same"),
        ({"regret.arms": "full@1000"}, "config.train.batch_rows: 1000 rows, but"),
        (
            {"data.validation_path": "embedded:data/train.jsonl"},
            "the prompts of 12 held-out rows are also trained on",
        ),
    ],
)
def test_what_an_experiment_cannot_do_is_one_line(tmp_path, fields, message):
    with pytest.raises(UserError) as error:
        command.main(config_of(tmp_path, **fields), dry_run=True)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_the_plan_counts_rows_that_are_skipped_by_reason(tmp_path, capsys):
    turns = [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]
    rows = [{"messages": [{"role": "user", "content": f"{i} + 1?"}, turns[1]]} for i in range(16)]
    rows += [{"messages": turns[:1]}, {"messages": [*turns, turns[0]]}]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    fields = {
        **{"data.train_path": str(file), "data.validation_path": "none", "data.on_bad_row": "skip"},
        **{"data.train_rows": "none", "data.validation_fraction": "0.2"},
    }
    assert command.main(config_of(tmp_path, **fields), dry_run=True) == 0
    shown = " ".join(capsys.readouterr().err.split())
    assert "skipped 2: line 17: no assistant turn at the end; line 18: no assistant turn" in shown


def test_the_plan_shows_the_steps_and_rates_that_the_runs_take(tmp_path):
    lab = Lab(config_of(tmp_path, **{"train.max_steps": "1", "regret.rates": "4"}))
    _, _, steps, _, rates, done, left = (list(column.cells) for column in command.plan_table(lab).columns)
    assert steps == [str(lab.job(run).plan.total_steps) for run in lab.left()[::4]] == ["1", "1"]
    assert rates == ["0.0001 to 0.0008", "0.001 to 0.008"]
    assert (done, left) == (["0", "0"], ["4", "4"])


def test_what_memory_cannot_hold_is_refused_before_anything_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr(worker, "memory_of", lambda device: 10_000_000)
    with pytest.raises(UserError, match=r"all_layer-r512 needs about .* GiB a device, which has 0\.0; give"):
        Lab(config_of(tmp_path, **{"regret.arms": "all_layer:512"}))


@pytest.mark.slow
def test_the_page_is_written_and_says_what_is_not_known(done, capsys):
    lab, records = done
    assert command.main(lab.config, only="report") == 0
    page = (lab.folder.path / "REGRET.md").read_text()
    assert f"{len(records)} runs (0 diverged)" in page
    assert "cannot say" in page
    assert "| full | 8 | 2 |" in page
    assert (lab.folder.path / "rates.png").stat().st_size > 10_000
    assert len((lab.folder.path / "runs.csv").read_text().splitlines()) == 1 + len(records)


@pytest.mark.slow
def test_norms_are_those_of_numpy(done):
    lab, _ = done
    run = next(worker.RunId(cell, 0, 0) for cell in lab.cells if cell.arm.what == "lora")
    spec = lab.job(run).spec
    rng = np.random.default_rng(0)
    trained = jax.tree.map(
        lambda x: rng.normal(size=x.shape).astype(np.float32), lab.state(lab.job(run)).trained
    )
    of_weights = weight_norms(lab._plain, lab.base)
    found = adapter_norms(spec, trained, of_weights)
    path = "layers.mlp.up_proj"
    a, b = (np.asarray(trained["layers"]["mlp"]["up_proj"][name])[1] for name in ("lora_a", "lora_b"))
    weight = np.asarray(lab.base["layers"]["mlp"]["up_proj"]["weight"])[1]
    update = spec.scale * b @ a
    norm = np.linalg.norm(update, 2)
    expected = {
        "a": np.linalg.norm(a, 2),
        "b": np.linalg.norm(b, 2),
        "update": norm,
        "stable_rank": np.sum(update**2) / norm**2,
        "share": norm / np.linalg.norm(weight, 2),
    }
    assert {name: values[1] for name, values in found[path].items()} == pytest.approx(expected, rel=0.02)
    assert set(found) == {weight.path for weight in spec.adapted}
    moved = jax.tree.map(lambda x: x + np.float32(0.01), lab.masters)
    changed = change_norms(lab._plain, moved, lab.masters, of_weights)[path]
    assert changed["update"][1] == pytest.approx(0.01 * math.sqrt(weight.size), rel=0.01)
    assert changed["stable_rank"][1] == pytest.approx(1, rel=0.01)


def test_programs_of_one_model_alone_are_kept():
    """Each holds a graph in a GPU's driver: those of a dozen ranks filled it."""
    first, second = (ModelSpec(published_config("qwen3-0.6b"), LoraConfig(rank=rank)) for rank in (1, 2))
    programs, batch = Programs(), {name: jnp.ones((1, 1, 4)) for name in ("tokens", "segment_ids")}
    step = jax.jit(lambda x, batch: x @ x + batch["tokens"].sum())
    for spec, compiles in ((first, True), (first, False), (second, True), (first, True)):
        programs.of(spec)
        programs.seconds = 0.0
        assert float(programs(step, jnp.ones((8, 8)), batch)[0, 0]) == 12
        assert (programs.seconds > 0) == compiles
        assert list(programs.flops(step)) == ["1x1x4"]
        assert programs.flops(step)["1x1x4"] >= 2 * 8**3
