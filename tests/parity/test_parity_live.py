"""The real Tinker SDK, a local service, and this package: the same numbers, measured now.

The service (SkyRL's JAX engine on the CPU) is started here, on loopback, in an environment of its own:
`python tools/tinker_parity.py install-server`. Without it, or without the SDK, these tests are skipped.
"""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import jax
import pytest
from helpers.tinker_recording import (
    POLICY,
    SETTINGS,
    TOKENIZER,
    embedded_rows,
    local_service,
    make_base,
    policy_prompts,
)

from jaxlora.config import MeshConfig
from jaxlora.data.render import RenderedRow, prompt_messages
from jaxlora.data.rows import load_rendered_rows
from jaxlora.parity.backend import AdamStep
from jaxlora.parity.comparing import compare
from jaxlora.parity.ours import OurBackend
from jaxlora.parity.policy import compare_policy, record_policy
from jaxlora.parity.recording import choose_rows, prompts_of, record
from jaxlora.parity.server import server_python
from jaxlora.parity.tinker_service import TinkerBackend
from jaxlora.runtime.errors import UserError
from jaxlora.sharding import make_mesh

pytestmark = pytest.mark.slow


def one_device():
    return make_mesh(MeshConfig(fsdp=1), jax.devices()[:1])


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return make_base(tmp_path_factory.mktemp("parity") / "base")


@pytest.fixture(scope="module")
def scratch(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("server")


@pytest.fixture(scope="module")
def service(base, scratch):
    pytest.importorskip("tinker", reason="the tinker SDK is not installed; pip install 'jaxlora[parity]'")
    try:
        server_python()
    except UserError as error:
        pytest.skip(str(error))
    with local_service(base, scratch) as backend:
        yield backend


@pytest.fixture(scope="module")
def gsm8k_rows(shared, tmp_path_factory) -> list[RenderedRow]:
    """GSM8K's own questions and answers, through this package's renderer."""
    file = tmp_path_factory.mktemp("gsm8k") / "train.jsonl"
    with file.open("w") as out:
        for line in (shared / "data" / "gsm8k" / "train.jsonl").read_text().splitlines()[:200]:
            row = json.loads(line)
            answer = {"role": "assistant", "content": row["answer"]}
            out.write(json.dumps({"messages": [*prompt_messages(row["question"]), answer]}) + "\n")
    return load_rendered_rows(file, TOKENIZER, max_length=4096, on_bad_row="error", limit=None)[0]


def check_parity(service: TinkerBackend, base: Path, rows: list[RenderedRow], out: Path) -> None:
    recording = record(service, rows, SETTINGS, out, "base", TOKENIZER.eos_token_id)
    checks = compare(recording, base, "float32", one_device())
    measured = {(check.case, check.name): check.value for check in checks}
    print(json.dumps({" ".join(key): value for key, value in measured.items()}, indent=1))
    assert [check for check in checks if not check.passed] == []
    for case in ("all_layer-equal", "all_layer-unequal"):
        assert measured[case, "log-probabilities in the steps, largest difference"] <= 1e-4
        assert measured[case, "adapter after the steps, relative"] <= 1e-3
        assert measured[case, "greedy tokens of the service's own adapter that differ"] == 0


def test_ten_steps_on_gsm8k_rows_are_the_services(service, base, gsm8k_rows, tmp_path):
    check_parity(service, base, gsm8k_rows, tmp_path / "gsm8k.json")


def test_ten_steps_on_the_embedded_rows_are_the_services(service, base, tmp_path):
    check_parity(service, base, embedded_rows(), tmp_path / "embedded.json")


def test_our_adapter_answers_the_same_in_the_service(service, base, scratch, tmp_path):
    """An adapter trained here, in the place of one that the service saved: same tokens, not the base's."""
    rows = choose_rows(embedded_rows(), SETTINGS)
    ours = OurBackend(base, "float32", "sum", one_device()).create("all_layer", rank=8, seed=5)
    for _ in range(5):
        ours.forward_backward(rows)
        ours.optim_step(AdamStep(1e-2))
    ours.fetch(ours.save("end"), tmp_path / "adapter")
    trainer = service.create("all_layer", rank=8, seed=1)
    checkpoint = trainer.save("ours")
    (archive,) = (scratch / "checkpoints").glob("*/sampler_weights/ours.tar.gz")
    with tarfile.open(archive, "w:gz") as tar:
        for file in (tmp_path / "adapter").iterdir():
            tar.add(file, arcname=file.name)
    prompts = prompts_of(rows, SETTINGS)
    theirs = trainer.sample(checkpoint, prompts, 16, TOKENIZER.eos_token_id)
    assert theirs == ours.sample("end", prompts, 16, TOKENIZER.eos_token_id)
    untrained = OurBackend(base, "float32", "sum", one_device()).create("all_layer", rank=8, seed=5)
    assert theirs != untrained.sample(untrained.save("start"), prompts, 16, TOKENIZER.eos_token_id)


def test_a_service_that_went_away_is_one_clear_line(service, monkeypatch):
    """The real SDK against a port where nobody listens."""
    monkeypatch.setenv("TINKER_BASE_URL", "http://127.0.0.1:9")
    with pytest.raises(UserError, match="the Tinker service") as caught:
        TinkerBackend("any", seconds=5).create("all_layer", 8, 0)
    assert "127.0.0.1" not in str(caught.value)


def test_ten_steps_of_each_policy_gradient_are_the_services(service, base, tmp_path):
    """From one adapter, on the same answers with the log-probabilities that the service recorded for them."""
    recording = record_policy(
        service, policy_prompts(), POLICY, tmp_path / "policy.json", "base", TOKENIZER.eos_token_id
    )
    checks = compare_policy(recording, base, "float32", one_device())
    print(json.dumps({f"{check.case} {check.name}": check.value for check in checks}, indent=1))
    assert [check for check in checks if not check.passed] == []
    assert len(checks) == 15
