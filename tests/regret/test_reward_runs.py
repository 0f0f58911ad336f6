"""Experiments that learn from rewards: the claims' rules on made-up runs, the page, one real miniature."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest

from jaxlora.cli import load_config
from jaxlora.regret import command
from jaxlora.regret.findings import AGREES, CANNOT, DISAGREES
from jaxlora.regret.results import RunFolder
from jaxlora.regret.rewards.findings import (
    bits_available,
    bits_learned,
    findings,
    plateau,
    start_of,
)
from jaxlora.regret.rewards.lab import RewardLab, open_ends
from jaxlora.regret.rewards.report import arms, write_report
from jaxlora.regret.rewards.runs import right_bits
from jaxlora.regret.sweeps import scatter_of, sweeps_of
from jaxlora.regret.worker import work
from jaxlora.runtime.errors import UserError

START = 0.2
GRIDS = {None: 3e-5, 1: 6e-4, 4: 6e-4}  # the middle of five rates, 3 apart, by rank


def made_up(rank, place, seed, end, steps=6):
    """A record in which accuracy rises in a line from the start to its end."""
    what = "full" if rank is None else f"all_layer-r{rank}"
    rate = GRIDS[rank] * 3.0**place
    rise = [START + (end - START) * step / steps for step in range(steps + 1)]
    return {
        **{"version": 1, "name": f"{what}-b64-lr{rate:g}-s{seed}", "arm": what, "rank": rank, "rate": rate},
        **{"what": "full" if rank is None else "lora", "place": place, "seed": seed, "steps": steps},
        **{"placement": "full" if rank is None else "all_layer", "parameters": 10**6 * (rank or 100)},
        **{"batch_rows": 64, "problems": 1000, "held_out_problems": 100, "device": "cpu", "jax": "0"},
        "identity": {"factor": 3.0},
        "held_out": [[step, 1 - right, 0.1] for step, right in enumerate(rise) if step % 2 == 0],
        "train": {
            "correct": rise[1:],
            "bits": [32.0] * steps,
            "right_bits": [math.log2(right) for right in rise[1:]],
            "kl": [1e-6] * steps,
        },
        **{"diverged_at": None, "stood_still_at": None},
        "seconds": {"all": 30.0, "compiling": 5.0, "step": 1.0, "sampling": 0.5, "learning": 0.5},
    }


def experiment(ends, noise=0.004):
    """Sweeps of made-up runs: accuracies at the end by rank and place; two more seeds at the best rate, which
    move every other arm the other way."""
    records = []
    for i, (rank, by_place) in enumerate(ends.items()):
        records += [made_up(rank, place, 0, end) for place, end in by_place.items()]
        best = max(by_place, key=by_place.get)
        records += [
            made_up(rank, best, s, by_place[best] + d)
            for s, d in ((1, noise * (-1) ** i), (2, -noise * (-1) ** i))
        ]
    return records


AS_IN_THE_POST = {
    None: {-2: 0.3, -1: 0.5, 0: 0.8, 1: 0.4, 2: 0.1},
    1: {-2: 0.3, -1: 0.75, 0: 0.8, 1: 0.78, 2: 0.2},
    4: {-2: 0.3, -1: 0.77, 0: 0.8, 1: 0.79, 2: 0.2},
}


def verdicts(records):
    return [finding.verdict for finding in findings(sweeps_of(records))]


def test_runs_like_those_of_the_post_agree_with_it():
    peak, wider, curve, _, room = verdicts(experiment(AS_IN_THE_POST))
    assert (peak, wider, curve, room) == (AGREES, AGREES, AGREES, AGREES)


def test_an_interval_that_holds_everything_decides_no_ratio():
    flat = AS_IN_THE_POST | {4: {-2: 0.3, -1: 0.79, 0: 0.8, 1: 0.79, 2: 0.2}}
    vague = findings(sweeps_of(experiment(flat, noise=0.06)))[3]
    assert "r4" in vague.figure
    assert vague.verdict == CANNOT


def test_an_adapter_that_falls_behind_disagrees():
    behind = AS_IN_THE_POST | {1: {-2: 0.3, -1: 0.55, 0: 0.6, 1: 0.58, 2: 0.2}}
    peak, _, curve, _, room = verdicts(experiment(behind))
    assert (peak, curve, room) == (DISAGREES, DISAGREES, DISAGREES)


def test_a_narrow_adapter_disagrees_and_an_open_grid_says_nothing():
    swapped = {None: AS_IN_THE_POST[1], 1: AS_IN_THE_POST[None], 4: AS_IN_THE_POST[None]}
    assert verdicts(experiment(swapped))[1] == DISAGREES
    open_end = AS_IN_THE_POST | {None: {-2: 0.3, -1: 0.3, 0: 0.4, 1: 0.5, 2: 0.8}}
    assert verdicts(experiment(open_end))[1] == CANNOT


def test_seeds_that_scatter_widely_or_lack_decide_no_tie():
    assert verdicts(experiment(AS_IN_THE_POST, noise=0.15))[0] == CANNOT
    alone = [record for record in experiment(AS_IN_THE_POST) if record["seed"] == 0]
    assert verdicts(alone) == [CANNOT, AGREES, CANNOT, CANNOT, CANNOT]


def test_a_plateau_ends_where_the_gain_falls_below_its_share():
    found = plateau({1e-4: 0.2, 1e-3: 0.6, 1e-2: 0.6, 1e-1: 0.2}, start=0.1, kept=0.8)
    # From 0.5 of gain to 0.1 over a decade, the bar 0.4 lies a quarter of it outside.
    assert found.low == pytest.approx(10**-3.25)
    assert found.high == pytest.approx(10**-1.75)
    assert not found.is_open
    near = plateau({1e-3: 0.1, 1e-2: 0.45, 1e-1: 0.6, 1.0: 0.45, 10.0: 0.1}, start=0.1, kept=0.8)
    assert near.high == pytest.approx(10 ** (-1 + 2 / 3))  # the first rate below the bar counts, not the next
    assert plateau({1e-4: 0.5, 1e-3: 0.6, 1e-2: 0.1}, 0.1).open_low
    assert plateau({1e-4: 0.1, 1e-3: 0.05}, 0.1) is None


def test_the_seed_that_chose_a_rate_is_no_evidence_for_it():
    records = [made_up(1, place, 0, end) for place, end in {-1: 0.5, 0: 0.8, 1: 0.4}.items()]
    (alone,) = sweeps_of(records, fresh=True)
    assert 1 - alone.final(None).mean == pytest.approx(0.8)
    (sweep,) = sweeps_of([*records, made_up(1, 0, 1, 0.6), made_up(1, 0, 2, 0.7)], fresh=True)
    assert (1 - sweep.final(None).mean, sweep.final(None).seeds) == (pytest.approx(0.65), 2)
    assert arms([sweep])[0]["seeds"] == 2
    assert scatter_of([sweep]) is not None


def test_rates_are_added_where_the_range_of_good_ones_is_open():
    def ends(by_place):
        records = [made_up(1, place, 0, end) for place, end in by_place.items()]
        grid = [SimpleNamespace(name=record["name"]) for record in records]
        return open_ends({record["name"]: record for record in records}, grid)

    assert ends({-1: 0.75, 0: 0.8, 1: 0.3}) == {"low"}
    assert ends({-1: 0.3, 0: 0.8, 1: 0.78}) == {"high"}
    assert ends({-1: 0.3, 0: 0.8, 1: 0.3}) == set()
    assert ends({-1: 0.1, 0: 0.15, 1: 0.1}) == set()  # nothing was gained


def test_bits_of_a_run():
    record = made_up(1, 0, 0, 0.8)
    assert bits_available(record) == 6 * 32
    rise = record["train"]["right_bits"]
    assert bits_learned(record) == pytest.approx(1000 * (sum(rise[3:]) - sum(rise[:3])) / 3)


def test_right_bits_of_groups():
    def group(*right):
        return SimpleNamespace(
            episodes=[SimpleNamespace(graded=SimpleNamespace(correct=one)) for one in right]
        )

    assert right_bits([group(True, False, False)]) == pytest.approx(math.log2(1.5 / 4))
    assert right_bits([group(True), group(False)]) == pytest.approx((math.log2(0.75) + math.log2(0.25)) / 2)


# --- Real runs in miniature ---------------------------------------------------------------------------------

FIELDS = {
    **{"prefix": "tiny-rl", "model.path": "embedded:base", "model.dtype": "float32"},
    **{"train.layout": "padded", "train.buffer_multiple": "32", "train.max_buffer_tokens": "2048"},
    **{"rl.problems": "embedded:data/train.jsonl", "rl.eval_problems": "embedded:data/val.jsonl"},
    **{"rl.eval_rows": "4", "rl.steps": "2", "rl.eval_every": "1", "rl.prompts": "2", "rl.group": "4"},
    **{"rl.max_new_tokens": "12", "rl.slots": "8", "rl.reward": "last_number"},
    **{"regret.arms": "all_layer:1", "regret.rates": "1", "regret.extend": "0", "regret.repeats": "1"},
}


def config_of(folder, **fields):
    return load_config("regret/rl_smollm2", FIELDS | {"results_dir": str(folder)} | fields)


@pytest.mark.slow
def test_an_experiment_makes_its_runs_and_its_page(tmp_path):
    lab = RewardLab(config_of(tmp_path))
    work(lab)
    records = lab.folder.records()
    assert sorted(record["seed"] for record in records.values()) == [0, 1]
    for record in records.values():
        assert [step for step, *_ in record["held_out"]] == [0, 1, 2]
        assert len(record["train"]["correct"]) == 2
    assert lab.left() == []
    assert "## Claims" in write_report(lab).read_text()
    with pytest.raises(UserError, match="another configuration"):
        RewardLab(config_of(tmp_path, **{"rl.temperature": "0.7"})).left()


def test_the_page_of_made_up_runs(tmp_path):
    config = config_of(tmp_path, **{"regret.arms": "full,all_layer:1,all_layer:4"})
    lab = RewardLab(config)
    for record in experiment(AS_IN_THE_POST):
        RunFolder(config).write(record)
    text = write_report(lab).read_text()
    assert "| Rank 1 reaches the accuracy of full fine-tuning |" in text
    assert text.count("**agrees**") >= 4
    for name in ("accuracy.png", "rates.png", "bits.png", "runs.csv", "arms.csv", "curves.csv"):
        assert (lab.folder.path / name).stat().st_size > 100
    sweeps = sweeps_of(lab.folder.records().values())
    assert start_of(sweeps) == pytest.approx(START)
    assert {row["name"]: round(row["end"], 3) for row in arms(sweeps)} == dict.fromkeys(
        ("full", "all_layer r1", "all_layer r4"), 0.8
    )


def test_what_an_experiment_refuses(tmp_path):
    with pytest.raises(UserError, match="eval_problems"):
        RewardLab(config_of(tmp_path, **{"rl.eval_problems": "none"}))
    with pytest.raises(UserError, match="leave out @ROWS"):
        RewardLab(config_of(tmp_path, **{"regret.arms": "all_layer:1@16"}))
    with pytest.raises(UserError, match=r"config\.regret\.factor"):
        command.check(config_of(tmp_path, **{"regret.by": "likelihood"}), None)
