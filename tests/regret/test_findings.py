"""The claims are answered by the rules that they state: made-up sweeps with known optima and gaps."""

from __future__ import annotations

import csv
import io
import math
import zlib

import matplotlib
import numpy as np
import pytest

from jaxlora.regret.drawings import FIGURES, save, styled
from jaxlora.regret.findings import AGREES, CANNOT, DISAGREES, departures, findings, rate_ratio
from jaxlora.regret.report import _speed, cells_csv, curves_csv, runs_csv
from jaxlora.regret.sweeps import find, main_batch, ranks_of, scatter_of, sweeps_of

STEPS = (1, 2, 4, 8, 16, 32, 64, 128, 200)
NOISE = 2e-4


def record(arm, placement, rank, rows, rate, seed, held_out, parameters=100, diverged_at=None, **more):
    weight = [10.0] * STEPS[-1]
    return {
        "name": f"{arm}-b{rows}-lr{rate:g}-s{seed}",
        "arm": arm,
        "what": "full" if rank is None else "lora",
        "placement": placement,
        "rank": rank,
        "parameters": parameters,
        "residual": None,
        "batch_rows": rows,
        "rate": rate,
        "seed": seed,
        "steps": STEPS[-1],
        "steps_per_epoch": STEPS[-1],
        "held_out": [[0, 2.0, 2.0], *held_out],
        "train": {"nll": [10.0] * STEPS[-1], "weight": weight},
        "diverged_at": diverged_at,
        "norms": {"layers.q": {"a": [1.0, 1.0], "b": [2.0, 3.0], "update": [1.0, 1.0]}},
        "seconds": {"all": 10.0, "compiling": 1.0, "looking": 1.0},
        "flops": {"1x1x512": 3e9 if rank is None else 2.1e9},
        "device": "cpu",
    } | more


def cell(arm, placement, rank, rows=32, best=1e-3, floor=1.5, leave=None, parameters=100, seeds=3, **more):
    """Five rates around `best`: the envelope falls as ln(step) to `floor`, from `leave` on less."""
    rng = np.random.default_rng(zlib.crc32(f"{arm}{rows}".encode()))
    made = []
    for place in range(-2, 3):
        for seed in range(seeds if place == 0 else 1):
            rate = best * 2.0**place
            curve = []
            for step in STEPS:
                loss = floor + 0.05 * math.log(STEPS[-1] / step) + 0.01 * place**2
                if leave is not None and step >= leave:
                    loss += 0.01 * math.log2(2 * step / leave)
                noisy = loss + rng.normal(0, NOISE) * (step > 5)
                curve.append([step, noisy, noisy])
            made.append(record(arm, placement, rank, rows, rate, seed, curve, parameters, **more))
    return made


def world(ratio=10.0, low_rank=(1, 16), attention=0.05, batch=0.01, **full):
    """Everything as the post says, but for what is asked otherwise."""
    made = cell("full", "full", None, best=1e-4, parameters=1000, **full)
    for rank, leave in ((1, low_rank[0]), (4, low_rank[1]), (16, 64), (64, None), (256, None)):
        best = 1e-4 * ratio / (2 if rank == 1 else 1)
        made += cell(f"all_layer-r{rank}", "all_layer", rank, best=best, leave=leave, parameters=10 * rank)
    made += cell("attention_only-r53", "attention_only", 53, floor=1.5 + attention, parameters=320)
    made += cell("mlp_only-r32", "mlp_only", 32, parameters=322)
    made += cell("mlp_only-r256", "mlp_only", 256, parameters=2560)
    for rows in (8, 128):
        shift = math.log2(rows / 32)
        made += cell("full", "full", None, rows, best=1e-4, floor=1.5 + 0.02 * shift)
        for rank in (16, 256):
            leave = 64 if rank == 16 else None
            floor = 1.5 + 0.02 * shift + batch * shift
            made += cell(f"all_layer-r{rank}", "all_layer", rank, rows, floor=floor, leave=leave)
    return sweeps_of(made)


def verdicts(sweeps):
    return {one.claim: one.verdict for one in findings(sweeps)}


def about(sweeps, words):
    (one,) = [one for one in findings(sweeps) if words in one.claim]
    return one


def test_a_world_as_the_post_describes_it_agrees():
    found = verdicts(world())
    undecided = ["short runs", "can store", "two and thirds"]
    wrong = {c: v for c, v in found.items() if v != AGREES and not any(word in c for word in undecided)}
    assert wrong == {}
    assert len(found) == 16


@pytest.mark.parametrize(
    ("world_of", "words", "verdict"),
    [
        ({"ratio": 3.0}, "ten times", DISAGREES),
        ({"floor": 1.48}, "follows the curve", DISAGREES),
        ({"low_rank": (64, 4)}, "grows with the rank", DISAGREES),
        ({"attention": -0.05}, "equal parameters", DISAGREES),
        ({"attention": 0.0}, "equal parameters", CANNOT),
        ({"batch": -0.01}, "grows with the batch size", DISAGREES),
        ({"batch": 0.0}, "grows with the batch size", CANNOT),
    ],
)
def test_a_world_that_differs_is_told(world_of, words, verdict):
    found = about(world(**world_of), words)
    assert found.verdict == verdict, found.figure


def test_without_repeats_no_difference_is_decided():
    sweeps = sweeps_of([r for sweep in world() for r in sweep.records if r["seed"] == 0])
    assert scatter_of(sweeps) is None
    for words in ("follows the curve", "ten times", "equal parameters", "batch size", "leave that curve"):
        assert about(sweeps, words).verdict == CANNOT


def test_nothing_is_concluded_from_nothing():
    assert {one.verdict for one in findings([])} == {CANNOT}


def test_a_best_rate_on_an_edge_gives_no_ratio_and_no_batch_gap():
    edge = [r for s in world() if s.full and s.batch_rows == 32 for r in s.records if r["rate"] >= 1e-4]
    sweeps = sweeps_of([*edge, *(r for s in world() if not s.full for r in s.records)])
    assert rate_ratio(sweeps, scatter_of(sweeps), 16) is None
    assert about(sweeps, "ten times").verdict == CANNOT


def test_a_placement_whose_best_rate_lies_on_an_edge_is_not_compared():
    made = [r for s in world() for r in s.records if s.placement != "mlp_only" or r["rate"] <= 1e-3]
    for words in ("equal parameters", "same rank"):
        assert about(world(), words).verdict == AGREES
        assert about(sweeps_of(made), words).verdict == CANNOT


def test_sweeps_know_their_place():
    sweeps = world()
    assert main_batch(sweeps) == 32
    assert [s.rank for s in ranks_of(sweeps)] == [1, 4, 16, 64, 256]
    assert find(sweeps, None).full
    assert find(sweeps, 16, batch_rows=8).batch_rows == 8
    assert find(sweeps, 3) is None
    scatter = scatter_of(sweeps)
    assert NOISE / 2 < scatter < NOISE * 2
    final = find(sweeps, 16).final(scatter)
    assert (final.seeds, final.error) == (3, scatter / math.sqrt(3))
    assert departures(sweeps, scatter) == {1: 1, 4: 16, 16: 64, 64: None}
    # Rank 16 is 0.01 above at step 64: more than 2 times this scatter, but not of a difference's.
    assert departures(sweeps, 0.004)[16] == 128


def test_a_run_that_diverged_is_no_best_one():
    records = cell("all_layer-r8", "all_layer", 8)
    for one in records:
        if one["rate"] > 1.5e-3:
            one["diverged_at"] = 40
            one["held_out"] = [row for row in one["held_out"] if row[0] <= 32]
    (sweep,) = sweeps_of(records)
    assert sweep.losses()[2e-3] == math.inf
    assert sweep.best(1e-4).on_grid == 1e-3
    assert sweep.envelope[-1].rate <= 1e-3
    assert len(sweep.envelope) == len(STEPS)


def test_every_figure_is_drawn_where_there_is_something_to_draw(tmp_path):
    sweeps = world()
    for name, draw in FIGURES.items():
        figure = styled(draw, sweeps, scatter_of(sweeps))
        assert figure is not None, name
        save(figure, tmp_path / f"{name}.png")
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert styled(draw, [], None) is None, name


def test_a_users_settings_of_matplotlib_change_no_figure(tmp_path):
    def drawn(**settings):
        with matplotlib.rc_context({name.replace("_", "."): value for name, value in settings.items()}):
            figure = styled(FIGURES["rates"], world(), 1e-4)
            save(figure, tmp_path / "rates.png")
        return (tmp_path / "rates.png").read_bytes()

    assert drawn() == drawn(savefig_facecolor="red", axes_facecolor="red", font_size=20)


def test_the_tables_hold_what_the_sweeps_say():
    sweeps = world()
    scatter = scatter_of(sweeps)
    rows = list(csv.DictReader(io.StringIO(cells_csv(sweeps, scatter))))
    assert len(rows) == len(sweeps)
    (full,) = [row for row in rows if (row["name"], row["batch_rows"]) == ("full", "32")]
    assert float(full["best_rate"]) == pytest.approx(1e-4, rel=0.05)
    assert float(full["low"]) < float(full["best_rate"]) < float(full["high"])
    assert float(full["bits"]) == pytest.approx(10 * 200 / math.log(2))
    assert float(full["bits_a_token"]) == pytest.approx(1 / math.log(2))
    curves = list(csv.DictReader(io.StringIO(curves_csv(sweeps))))
    assert len(curves) == len(sweeps) * len(STEPS)
    assert len(runs_csv([r for s in sweeps for r in s.records]).splitlines()) == 1 + sum(
        len(s.records) for s in sweeps
    )


def test_sweep_speed_counts_the_time_in_which_any_process_made_a_run():
    """Two processes side by side for 20 s, a pause, and 10 s of one: three runs in 30 s."""
    made = [record("full", "full", None, 32, 1e-4, seed, []) for seed in range(4)]
    for one, ended in zip(made, (120.0, 115.0, 500.0), strict=False):
        one["ended"] = ended
    made[0]["seconds"] = {"all": 20.0}
    assert _speed(made) == "; by the clock 3 runs in 30 s, 360 in an hour"
    assert _speed(made[3:]) == ""
