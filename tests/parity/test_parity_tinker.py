"""The Tinker client sends what the study sent, waits only so long, and keeps its secrets."""

from __future__ import annotations

import io
import shutil
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxlora.checkpoints.adapters import read_adapter
from jaxlora.data.render import RenderedRow
from jaxlora.models.families import load_model_config
from jaxlora.parity.backend import AdamStep
from jaxlora.parity.server import PINS, server_python
from jaxlora.parity.tinker_service import TinkerBackend, switches, unpack_adapter
from jaxlora.runtime.errors import UserError

FIXTURE = Path(__file__).parents[1] / "fixtures" / "tinker"
KEY, URL = "tml-very-secret-key", "https://service.example:8443/tinker"


class Future:
    def __init__(self, value):
        self.value = value

    def result(self, timeout=None):
        assert timeout is not None, "every wait has a time limit"
        return self.value


class FakeTinker:
    """A `tinker` module that remembers what it was asked."""

    __version__ = "0.0.0"

    def __init__(self, fail=None, answers=None):
        self.asked: list[tuple[str, object]] = []
        self.fail = fail
        self.answers = answers
        self.types = SimpleNamespace(
            AdamParams=lambda **fields: fields,
            Datum=lambda **fields: fields,
            ModelInput=SimpleNamespace(from_ints=lambda tokens: tokens),
            TensorData=SimpleNamespace(from_numpy=lambda array: array),
            SamplingParams=lambda **fields: fields,
        )

    def ServiceClient(self):
        if self.fail == "hang":
            time.sleep(30)
        if self.fail:
            raise ConnectionError(self.fail)
        return self

    def create_lora_training_client(self, **fields):
        self.asked.append(("create", fields))
        return self

    def forward_backward(self, datums, loss):
        self.asked.append((loss, datums))
        return Future(SimpleNamespace(loss_fn_outputs=self.answers, metrics={"loss:sum": 7.0}))

    def optim_step(self, settings):
        self.asked.append(("adam", settings))
        return Future(None)


@pytest.fixture
def connect(monkeypatch):
    monkeypatch.setenv("TINKER_API_KEY", KEY)
    monkeypatch.setenv("TINKER_BASE_URL", URL)

    def call(fake: FakeTinker, seconds: float = 5.0) -> TinkerBackend:
        monkeypatch.setitem(sys.modules, "tinker", fake)
        return TinkerBackend("Qwen/Qwen3-8B", seconds)

    return call


def test_importing_the_package_never_imports_tinker():
    code = (
        "import pkgutil, sys, importlib, jaxlora\n"
        "for m in pkgutil.walk_packages(jaxlora.__path__, 'jaxlora.'): importlib.import_module(m.name)\n"
        "assert 'jaxlora.parity.tinker_service' in sys.modules\n"
        "assert not [m for m in sys.modules if m == 'tinker' or m.startswith('tinker.')]"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


@pytest.mark.parametrize(
    ("condition", "attn", "mlp"),
    [("attention_only", True, False), ("mlp_only", False, True), ("all_layer", True, True)],
)
def test_all_three_switches_are_always_sent(connect, condition, attn, mlp):
    fake = FakeTinker()
    connect(fake).create(condition, rank=8, seed=3)
    sent = {"train_attn": attn, "train_mlp": mlp, "train_unembed": False}
    assert switches(condition) == sent
    assert fake.asked == [("create", {"base_model": "Qwen/Qwen3-8B", "rank": 8, "seed": 3} | sent)]


def test_datums_are_the_renderers_rows_shifted_by_one(connect):
    row = RenderedRow("a", np.array([5, 6, 7, 8], np.int32), np.array([0, 0, 1, 1], np.float32))
    fake = FakeTinker(answers=[{"logprobs": np.array([-1.0, -2.0, -3.0])}])
    answer = connect(fake).create("all_layer", 8, 0).forward_backward([row])
    loss, (datum,) = fake.asked[-1]
    assert loss == "cross_entropy"
    assert datum["model_input"] == [5, 6, 7]
    assert datum["loss_fn_inputs"]["target_tokens"].tolist() == [6, 7, 8]
    assert datum["loss_fn_inputs"]["weights"].tolist() == [0, 1, 1]
    assert answer.logprobs[0].tolist() == [-1, -2, -3]
    assert answer.loss == 7.0


def test_a_wrong_number_of_values_is_an_error(connect):
    row = RenderedRow("a", np.array([5, 6, 7, 8], np.int32), np.array([0, 0, 1, 1], np.float32))
    fake = FakeTinker(answers=[{"logprobs": np.array([-1.0, -2.0])}])
    with pytest.raises(UserError, match=r"answered \[2\] values for \[3\] targets"):
        connect(fake).create("all_layer", 8, 0).forward_backward([row])


def test_adam_is_the_studys(connect):
    fake = FakeTinker()
    connect(fake).create("all_layer", 8, 0).optim_step(AdamStep(3e-4))
    sent = {"learning_rate": 3e-4, "beta1": 0.9, "beta2": 0.95, "eps": 1e-12, "weight_decay": 0.0}
    assert fake.asked[-1] == ("adam", sent)


def test_a_service_that_does_not_answer_is_one_clear_line(connect):
    start = time.monotonic()
    with pytest.raises(UserError, match=r"did not answer within 0\.2 s while connecting") as caught:
        connect(FakeTinker(fail="hang"), seconds=0.2)
    assert time.monotonic() - start < 5
    assert KEY not in str(caught.value)
    assert "service.example" not in str(caught.value)


@pytest.mark.parametrize(
    "leak", [f"401 for key {KEY}", f"cannot reach {URL}/api", "host service.example:8443 down"]
)
def test_neither_key_nor_address_is_ever_shown(connect, leak):
    with pytest.raises(UserError, match="failed while connecting: ConnectionError") as caught:
        connect(FakeTinker(fail=leak))
    assert KEY not in str(caught.value)
    assert "service.example" not in str(caught.value)
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__ or caught.value.__context__ is None


def test_without_a_key_nothing_is_sent(connect, monkeypatch):
    monkeypatch.delenv("TINKER_API_KEY")
    fake = FakeTinker(fail="must not be called")
    monkeypatch.setitem(sys.modules, "tinker", fake)
    with pytest.raises(UserError, match="TINKER_API_KEY is not set"):
        TinkerBackend("Qwen/Qwen3-8B")


def test_without_the_sdk_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "tinker", None)
    with pytest.raises(UserError, match=r"pip install 'jaxlora\[parity\]'"):
        TinkerBackend("Qwen/Qwen3-8B")


def test_a_missing_or_old_server_environment_names_the_command(monkeypatch, tmp_path):
    monkeypatch.setenv("JAXLORA_TINKER_SERVER", str(tmp_path))
    with pytest.raises(UserError, match=r"is not installed; python tools/tinker_parity\.py install-server"):
        server_python()
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").touch()
    with pytest.raises(UserError, match="is outdated or only partly installed"):
        server_python()
    (tmp_path / "pins.txt").write_text("\n".join(PINS))
    assert server_python() == tmp_path / "bin" / "python"


# --- Adapters from Tinker -----------------------------------------------------------------------------------


def archive(files: dict[str, bytes], mode: str = "w:gz") -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


@pytest.mark.parametrize("mode", ["w:gz", "w"])
def test_a_recorded_archive_of_tinker_is_imported(tmp_path, mode):
    source = FIXTURE / "recording-adapters" / "all_layer-equal" / "end"
    content = archive({f"./{file.name}": file.read_bytes() for file in source.iterdir()}, mode)
    unpack_adapter(content, tmp_path)
    lora, tree, metadata, _ = read_adapter(tmp_path, load_model_config(FIXTURE / "base"))
    assert (lora.condition, lora.rank, lora.alpha) == ("all_layer", 8, 32.0)
    assert metadata["seed"] is None
    stored = load_file(tmp_path / "adapter_model.safetensors")
    name = "base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"
    assert np.array_equal(tree["layers"]["mlp"]["up_proj"]["lora_b"][1], stored[name])


def test_tinkers_name_of_the_output_head_is_understood(tmp_path):
    shutil.copytree(FIXTURE / "recording-adapters" / "all_layer-equal" / "end", tmp_path / "a")
    config = load_model_config(FIXTURE / "base")
    file = tmp_path / "a" / "adapter_model.safetensors"
    head_a = np.ones((8, config.hidden_size), np.float32)
    head_b = np.full((config.vocab_size, 8), 2.0, np.float32)
    names = {
        f"base_model.model.model.unembed_tokens.lora_{p}.weight": x for p, x in (("A", head_a), ("B", head_b))
    }
    save_file(load_file(file) | names, file)
    lora, tree, _, _ = read_adapter(tmp_path / "a", config)
    assert (lora.condition, lora.output_head) == ("all_layer", True)
    assert np.array_equal(tree["lm_head"]["lora_b"], head_b)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"not an archive", "cannot be read"),
        (archive({"adapter_config.json": b"{}", "readme": b""}), r"holds no adapter_model\.safetensors"),
        (archive({"adapter_model.safetensors": b"1", "adapter_config.json": b"{}"})[:-40], "cannot be read"),
    ],
)
def test_a_broken_archive_is_one_line(tmp_path, content, message):
    with pytest.raises(UserError, match=message):
        unpack_adapter(content, tmp_path)


def test_nothing_of_an_archive_is_written_outside_its_folder(tmp_path):
    files = {"../escaped": b"x", "adapter_model.safetensors": b"1", "../adapter_config.json": b"{}"}
    (tmp_path / "in").mkdir()
    unpack_adapter(archive(files), tmp_path / "in")
    assert {file.relative_to(tmp_path).as_posix() for file in tmp_path.rglob("*") if file.is_file()} == {
        "in/adapter_model.safetensors",
        "in/adapter_config.json",
    }
