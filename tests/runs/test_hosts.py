"""Several hosts compute what one computes, write once, stop together, and resume as any number of hosts."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path

import jax
import numpy as np
import pytest
from helpers.hf_models import make_checkpoint
from helpers.host_processes import kill, logs, run_hosts, start_hosts, wait, wait_for
from safetensors.numpy import load_file

from jaxlora.runtime import hosts
from jaxlora.runtime.errors import UserError
from jaxlora.runtime.files import read_jsonl

TIMES = {"seconds", "tokens_per_second", "model_flops_utilisation", "peak_memory_bytes"}
TIMES |= {"generated_tokens_per_second"}
RUN = "tiny-all_layer-seed-0"
ADAPTER = f"{RUN}/selected/adapter_model.safetensors"
WORKER = Path(__file__).parents[1] / "helpers" / "host_worker.py"


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory, repository) -> Path:
    """A random two-layer model with the embedded tokenizer."""
    folder = tmp_path_factory.mktemp("model")
    sizes = {"vocab_size": 1024, "hidden_size": 32, "num_hidden_layers": 2, "tie_word_embeddings": True}
    make_checkpoint(folder, initializer_range=0.05, **sizes)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(repository / "jaxlora/embedded/base" / name, folder)
    return folder


def training(model_dir: Path, results: Path, **fields) -> list[str]:
    """Six steps of eight rows, four validations, a checkpoint after each step, then both evaluations."""
    fields = {
        "model__path": model_dir,
        "results_dir": results,
        "data__train_rows": 24,
        "data__validation_rows": 8,
        "train__validation_every": 2,
        "train__validation_merge": 0,
        "train__checkpoint_every": 1,
        "train__startup_check": False,
        "eval__problems": 6,
        "eval__max_new_tokens": 6,
        "eval__batch_rows": 4,
    } | fields
    words = [f"--config.{name.replace('__', '.')}={value}" for name, value in fields.items()]
    return ["launch/train.py", "--config", "configs/tiny.py", *words]


def records(file: Path) -> list[dict]:
    """The lines of a metrics file without what the clock made."""
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in TIMES} for line in lines]


def n_lines(file: Path) -> int:
    return file.read_text().count("\n") if file.is_file() else 0


def checkpoints(results: Path) -> list[int]:
    """Steps with a published checkpoint."""
    return [int(entry.name) for entry in (results / RUN / "checkpoints").glob("*") if entry.name.isdigit()]


def flat(file: Path) -> np.ndarray:
    tensors = load_file(file)
    return np.concatenate([tensors[name].ravel() for name in sorted(tensors)])


def check_same_result(results: Path, reference: Path) -> None:
    """The same records in the same order, losses and adapter to 1e-5, the same answers."""
    ours, theirs = records(results / RUN / "metrics.jsonl"), records(reference / RUN / "metrics.jsonl")
    assert [(r["split"], r["step"]) for r in ours] == [(r["split"], r["step"]) for r in theirs]
    for name in ("loss", "grad_norm", "update_norm"):
        pairs = [(a[name], b[name]) for a, b in zip(ours, theirs, strict=True) if name in b]
        np.testing.assert_allclose(*zip(*pairs, strict=True), rtol=1e-5)
    a, b = flat(results / ADAPTER), flat(reference / ADAPTER)
    assert np.linalg.norm(a - b) / np.linalg.norm(b) < 1e-5
    for name in ("tiny-base", RUN):
        file = Path(name) / "evaluation" / "predictions.jsonl"
        assert (results / file).read_bytes() == (reference / file).read_bytes()


@pytest.fixture(scope="module")
def one_process(model_dir, tmp_path_factory) -> Path:
    """The results of one process with one device, never interrupted."""
    results = tmp_path_factory.mktemp("one")
    run_hosts(1, training(model_dir, results), results / "logs")
    assert len(records(results / RUN / "metrics.jsonl")) == 10
    return results


def killed_and_resumed(
    model_dir: Path, results: Path, first: int, then: int, *, devices: int = 1, **fields
) -> None:
    """Train with `first` processes, kill them all when step 2 is saved, go on with `then`."""
    words = training(model_dir, results, **fields)
    running = start_hosts(first, words, results / "logs", devices=devices)
    try:
        wait_for(lambda: max(checkpoints(results), default=0) >= 2, running)
    finally:
        kill(running)
    written = [(r["split"], r["step"]) for r in read_jsonl(results / RUN / "metrics.jsonl")]
    assert len(written) == len(set(written)) >= 3, "one process writes each record, once"
    assert not (results / RUN / "summary.json").exists(), "it ended before it was killed: make it longer"
    resumed = run_hosts(then, words, results / "logs", devices=devices)
    assert "resuming" in resumed[0].text


# --- One result, however many hosts -------------------------------------------------------------------------


def test_two_hosts_killed_and_resumed_as_one_give_the_result_of_one(model_dir, one_process, tmp_path):
    killed_and_resumed(model_dir, tmp_path, 2, 1, train__startup_check=True)
    check_same_result(tmp_path, one_process)


def test_two_hosts_evaluate_together_and_one_writes(model_dir, one_process, tmp_path):
    shutil.copytree(one_process / RUN, tmp_path / RUN)
    shutil.rmtree(tmp_path / RUN / "evaluation")
    fields = training(model_dir, tmp_path)[3:]
    words = ["launch/evaluate.py", "--config", "configs/tiny.py", "--run", tmp_path / RUN, *fields]
    run_hosts(2, words, tmp_path / "logs")
    name = f"{RUN}/evaluation/predictions.jsonl"
    assert (tmp_path / name).read_bytes() == (one_process / name).read_bytes()
    refused = run_hosts(2, words, tmp_path / "logs", code=2)
    assert all("already holds an evaluation" in host.text for host in refused)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("first", "then", "devices", "mesh"),
    [
        (2, 4, 1, {"fsdp": -1}),
        (4, 2, 1, {"data": -1, "fsdp": 1}),
        (1, 2, 2, {"tensor": 2, "fsdp": -1}),
    ],
    ids=str,
)
def test_any_number_of_hosts_goes_on_from_any_other(
    model_dir, one_process, tmp_path, first, then, devices, mesh
):
    fields = {f"mesh__{axis}": size for axis, size in mesh.items()}
    killed_and_resumed(model_dir, tmp_path, first, then, devices=devices, **fields)
    check_same_result(tmp_path, one_process)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mesh", "layout"),
    [((2, 1, 1), "packed"), ((1, 2, 1), "packed"), ((1, 1, 2), "padded"), ((2, 2, 1), "padded")],
    ids=str,
)
def test_every_axis_may_lie_over_hosts(model_dir, tmp_path, mesh, layout):
    fields = {"train__layout": layout, "train__checkpoint_every": "none", "eval__after_training": False}
    axes = dict(zip(("mesh__data", "mesh__fsdp", "mesh__tensor"), mesh, strict=True))
    for name, n, own in (("one", 1, {}), ("several", int(np.prod(mesh)), axes)):
        words = training(model_dir, tmp_path / name, **fields, **own)
        run_hosts(n, words, tmp_path / "logs")
    a, b = (records(tmp_path / name / RUN / "metrics.jsonl") for name in ("several", "one"))
    np.testing.assert_allclose([r["loss"] for r in a], [r["loss"] for r in b], rtol=1e-5)
    a, b = (flat(tmp_path / name / ADAPTER) for name in ("several", "one"))
    assert np.linalg.norm(a - b) / np.linalg.norm(b) < 1e-5


@pytest.mark.slow
def test_an_adapter_split_over_hosts_is_saved_resumed_and_exported_whole(model_dir, tmp_path):
    fields = {"lora__rank": 256, "eval__merge_adapter": False}
    run_hosts(1, training(model_dir, tmp_path / "one", **fields), tmp_path / "logs")
    killed_and_resumed(model_dir, tmp_path / "two", 2, 4, **fields)
    check_same_result(tmp_path / "two", tmp_path / "one")


@pytest.mark.slow
def test_the_same_number_of_hosts_writes_the_same_bytes(model_dir, tmp_path):
    """Also where one of the two was killed on the way."""
    run_hosts(2, training(model_dir, tmp_path / "a"), tmp_path / "logs")
    killed_and_resumed(model_dir, tmp_path / "b", 2, 2)
    for name in ("tiny-base", RUN):
        assert records(tmp_path / "a" / name / "evaluation/metrics.jsonl") == records(
            tmp_path / "b" / name / "evaluation/metrics.jsonl"
        )
    assert records(tmp_path / f"a/{RUN}/metrics.jsonl") == records(tmp_path / f"b/{RUN}/metrics.jsonl")
    same = ["selected/adapter_model.safetensors", "selected/adapter_config.json", "selected/jaxlora.json"]
    same += ["sample_render.txt", "validation.png", "evaluation/predictions.jsonl"]
    for name in same:
        assert (tmp_path / "a" / RUN / name).read_bytes() == (tmp_path / "b" / RUN / name).read_bytes(), name


@pytest.mark.slow
def test_a_signal_to_one_host_stops_all_after_the_same_step(model_dir, one_process, tmp_path):
    words = training(model_dir, tmp_path, train__checkpoint_every="none")
    running = start_hosts(2, words, tmp_path / "logs")
    wait_for(lambda: n_lines(tmp_path / RUN / "metrics.jsonl") >= 1, running)
    os.kill(running[1].process.pid, signal.SIGTERM)
    assert wait(running) == [75, 75], logs(running)
    last = records(tmp_path / RUN / "metrics.jsonl")[-1]["step"]
    assert max(checkpoints(tmp_path)) == last
    run_hosts(2, words, tmp_path / "logs")
    check_same_result(tmp_path, one_process)


# --- Talking ------------------------------------------------------------------------------------------------


def test_hosts_agree_broadcast_and_gather(tmp_path):
    finished = run_hosts(3, [WORKER, "talk", tmp_path], tmp_path / "logs")
    found = [_reported(host.text) for host in finished]
    assert [values.pop("main") for values in found] == [True, False, False]
    for values in found:
        assert values == {
            "asked_by_the_last": True,
            "asked_by_none": False,
            "said": {"from": 0},
            "whole": True,
        }


def test_each_host_reads_its_share_of_the_base(model_dir, tmp_path):
    for host in run_hosts(2, [WORKER, "load", model_dir], tmp_path / "logs"):
        values = _reported(host.text)
        assert values["same"]
        assert 0.45 < values["share"] < 0.55


@pytest.mark.slow
def test_a_random_base_is_the_same_on_any_number_of_hosts(model_dir, tmp_path):
    for host in run_hosts(2, [WORKER, "draw", model_dir], tmp_path / "logs"):
        assert _reported(host.text)["same"]


def test_a_torn_entry_of_the_compilation_cache_is_compiled_again(tmp_path):
    """Process 0 alone writes entries, but not atomically: others may read half of one; a kill leaves it."""
    cache = tmp_path / "cache"
    own = {"JAX_COMPILATION_CACHE_DIR": str(cache), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    for _ in range(2):
        finished = run_hosts(2, [WORKER, "talk", tmp_path], tmp_path / "logs", variables=[own, own])
        assert all(_reported(host.text)["whole"] for host in finished)
        entries = list(cache.glob("*-cache"))
        assert entries
        for entry in entries:
            entry.write_bytes(entry.read_bytes()[: entry.stat().st_size // 2])
    assert "Error reading persistent compilation cache entry" in finished[0].text


def _reported(text: str) -> dict:
    (line,) = [line for line in text.splitlines() if line.startswith("{")]
    return json.loads(line)


# --- Failing together ---------------------------------------------------------------------------------------


def test_a_mistake_on_one_host_stops_all_with_its_message_and_code(tmp_path):
    other, failed = run_hosts(2, [WORKER, "refuse", tmp_path], tmp_path / "logs", code=2)
    assert "error: this host has no such file\n" in failed.text
    assert "error: process 1: this host has no such file\n" in other.text


def test_a_crash_on_one_host_stops_all(tmp_path):
    failed, other = run_hosts(2, [WORKER, "crash", tmp_path], tmp_path / "logs", code=1)
    assert "Traceback" in failed.text
    assert "error: process 0: ZeroDivisionError: seven by zero\n" in other.text


def test_a_host_that_is_killed_does_not_leave_the_others_waiting(tmp_path):
    running = start_hosts(2, [WORKER, "die", tmp_path], tmp_path / "logs")
    assert wait(running) == [1, -signal.SIGKILL], logs(running)


def test_a_barrier_has_a_time_limit_and_names_itself(tmp_path):
    running = start_hosts(2, [WORKER, "stay_away", tmp_path], tmp_path / "logs")
    assert wait(running) == [1, 1], logs(running)
    assert "error: not all hosts reached 'saved' within 1 s" in running[0].text


def test_a_folder_that_hosts_do_not_share_is_refused(tmp_path):
    refused = run_hosts(2, [WORKER, "share", tmp_path], tmp_path / "logs", code=2)
    for host in refused:
        assert "the hosts need a shared folder" in host.text
    assert not list(tmp_path.glob(".shared-*"))


def test_hosts_that_were_given_different_runs_are_refused(tmp_path):
    first, second = run_hosts(2, [WORKER, "differ", tmp_path], tmp_path / "logs", code=2)
    assert "error: results/run: not the same on every host: another host differs" in first.text
    assert "error: results/run: not the same on every host: this host differs in seed" in second.text


def test_a_coordinator_that_does_not_answer_is_one_line(tmp_path):
    alone = {"JAX_COORDINATOR_ADDRESS": "127.0.0.1:9", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"}
    variables = [alone | {"CONNECT_SECONDS": "2"}]
    (host,) = run_hosts(1, [WORKER, "talk", tmp_path], tmp_path / "logs", code=1, variables=variables)
    assert host.text.startswith("error: the hosts did not find each other within 2 s (process 1 of 2")
    assert host.text.count("\n") == 1


# --- One host -----------------------------------------------------------------------------------------------


def test_in_one_process_nothing_waits_and_nothing_is_joined(monkeypatch, tmp_path):
    for name in ("COORDINATOR_ADDRESS", "NUM_PROCESSES", "PROCESS_ID"):
        monkeypatch.delenv(f"JAX_{name}", raising=False)
    hosts.start()
    assert not jax.distributed.is_initialized()
    assert hosts.is_main()
    assert hosts.n_processes() == 1
    assert hosts.agree(True)
    assert not hosts.agree(False)
    assert hosts.broadcast({"a": 1}) == {"a": 1}
    assert hosts.whole({"a": jax.numpy.arange(3)})["a"].tolist() == [0, 1, 2]
    hosts.barrier("nobody else")
    hosts.check_same({"seed": 0}, "run")
    hosts.check_shared(tmp_path / "not made")
    assert not (tmp_path / "not made").exists()


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        (("127.0.0.1:1", "2", None), "set all of JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES, JAX_PROCESS_ID"),
        ((None, None, "0"), "set all of"),
        (("127.0.0.1", "2", "0"), "is invalid"),
        (("127.0.0.1:1", "2", "2"), "is invalid"),
        (("127.0.0.1:1", "two", "0"), "is invalid"),
    ],
)
def test_half_a_description_of_the_hosts_is_refused(monkeypatch, variables, message):
    for name, value in zip(("COORDINATOR_ADDRESS", "NUM_PROCESSES", "PROCESS_ID"), variables, strict=True):
        if value is None:
            monkeypatch.delenv(f"JAX_{name}", raising=False)
        else:
            monkeypatch.setenv(f"JAX_{name}", value)
    with pytest.raises(UserError, match=message):
        hosts.start()


@pytest.mark.parametrize(
    ("device", "names", "n"),
    [
        (None, "a,b", 1),  # a laptop that plans for a slice
        ("accel0", "a", 1),
        ("accel0", "a,b,c,d", 4),
        ("vfio/0", "a,b", 2),
    ],
)
def test_the_hosts_of_a_slice_are_counted_where_there_is_a_tpu(monkeypatch, tmp_path, device, names, n):
    if device:
        (tmp_path / device).parent.mkdir(exist_ok=True)
        (tmp_path / device).touch()
    monkeypatch.setattr(hosts, "_DEVICES", tmp_path)
    for name in ("TPU_PROCESS_ADDRESSES", "TPU_WORKER_HOSTNAMES", "TPU_SKIP_MDS_QUERY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(hosts, "_metadata", lambda: names)
    assert hosts._tpu_hosts() == n  # on a machine of Cloud TPU
    monkeypatch.setattr(hosts, "_metadata", lambda: None)
    monkeypatch.setenv("TPU_WORKER_HOSTNAMES", names)
    assert hosts._tpu_hosts() == n  # on GKE
