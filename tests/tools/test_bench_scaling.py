"""`jaxlora bench scaling` measures every number of devices with a command a user could give."""

from __future__ import annotations

import json
import re
import sys

import pytest

from jaxlora.commands import bench
from jaxlora.commands.bench import correlated, default_answers, default_rows, seen_earlier
from jaxlora.commands.bench_scaling import STRONG, WEAK, cases, show, waves
from jaxlora.runtime.errors import UserError


def rows_and_mesh(words) -> tuple[int, int]:
    sizes = dict(word.removeprefix("--config.mesh.").split("=") for word in words if "--config.mesh." in word)
    return int(words[words.index("--batch-rows") + 1]), int(sizes["data"]) * int(sizes["fsdp"])


def test_each_measurement_uses_all_of_its_devices():
    found = cases(8)
    assert len({case.name for case in found}) == len(found)
    for case in found:
        if case.words[0] == "train":
            rows, devices = rows_and_mesh(case.words)
            assert devices == case.n
            assert rows == (STRONG if case.name.startswith("strong") else WEAK * case.n)
    assert {case.n for case in found if case.name.startswith("weak")} == {1, 2, 4, 8}
    assert [case.name for case in cases(1)] == ["weak-1", "strong-1", "decode-1"]


def test_measurements_run_beside_each_other_and_none_is_lost():
    for n in (1, 2, 4, 8):
        found = waves(cases(n), n)
        assert sorted(case.name for group in found for case in group) == sorted(c.name for c in cases(n))
        assert all(sum(case.n for case in group) <= n for group in found)
        assert len(found) == -(-sum(case.n for case in cases(n)) // n)  # no GPU waits but in the last group


def test_efficiency_is_the_rate_over_as_many_times_that_of_one_gpu(capfd):
    rates = {"weak-1": 100.0, "weak-2": 170.0}
    chosen = [case for case in cases(2) if case.name in rates]
    show(
        chosen,
        {
            name: {"real_tokens_per_second": rate, "mesh": "data=1", "peak_memory_gib": None}
            for name, rate in rates.items()
        },
    )
    (line,) = [line for line in capfd.readouterr().err.splitlines() if "weak-2" in line]
    assert re.findall(r"[\w.=%-]+", line)[2:] == ["data=1", "170", "1.70", "85%"]


@pytest.mark.slow
def test_a_rehearsal_on_simulated_devices(monkeypatch, capfd, tmp_path):
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=2")
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    words = ["--model", "embedded:base", "--num-layers", "1", "--dtype", "float32", "--steps", "1"]
    words += ["--prompts", "6", "--slots", "4", "--only", "weak-2,decode-2", "--buffer-sizes", "1"]
    monkeypatch.setattr(sys, "argv", ["bench", "scaling", *words, "--out", str(tmp_path / "out.jsonl")])
    assert bench.main() == 0
    found = {r["measurement"]: r for r in map(json.loads, (tmp_path / "out.jsonl").read_text().splitlines())}
    assert found.keys() == {"weak-2", "decode-2"}
    assert found["weak-2"]["devices"] == found["decode-2"]["devices"] == 2
    assert found["weak-2"]["mesh"] == "data=2, fsdp=1, tensor=1"
    assert found["decode-2"]["prompts"] == 12
    assert "weak-2" in capfd.readouterr().err


def test_an_unknown_measurement_is_refused(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    monkeypatch.setattr(sys, "argv", ["bench", "scaling", "--only", "weak-3"])
    with pytest.raises(UserError, match=r"--only: 'weak-3' is not known on 2 devices; choose from weak-1"):
        bench.main()


def test_lengths_correlate_as_asked():
    import numpy as np

    prompts, answers = default_answers()
    logs = np.log(answers)
    for wanted in (0.0, 0.5, 1.0):
        again = correlated(prompts, answers, wanted)
        assert sorted(again) == sorted(prompts)
        assert np.corrcoef(np.log(again), logs)[0, 1] == pytest.approx(wanted, abs=0.08)
        assert np.corrcoef(np.log(seen_earlier(answers, wanted)), logs)[0, 1] == pytest.approx(
            wanted, abs=0.08
        )
    assert len(default_rows()) == 512
