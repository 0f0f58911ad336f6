"""What a run hands on says what it is, loads elsewhere, and reaches the Hub only when asked, in private."""

from __future__ import annotations

import json
import os
import stat
from types import SimpleNamespace

import huggingface_hub
import pytest
import yaml
from helpers.hf_models import make_checkpoint
from huggingface_hub import ModelCard
from huggingface_hub.errors import RepositoryNotFoundError
from peft import PeftConfig

from jaxlora.checkpoints.base import find_base
from jaxlora.checkpoints.peft import export_adapter
from jaxlora.config import LoraConfig, ModelSource, RunConfig, to_dict
from jaxlora.lora import init_lora
from jaxlora.models.decoder import ModelSpec
from jaxlora.models.families import load_model_config
from jaxlora.runtime.records import metric_record

KEY = "hf_" + "k" * 34


@pytest.fixture
def run(tmp_path):
    """A finished run on a base in the Hub's cache, with curves, data and scores."""
    snapshot = tmp_path / "models--owner--Base-1B" / "snapshots" / "abc"
    make_checkpoint(snapshot)
    source = ModelSource(path=str(snapshot), dtype="float32")
    config = RunConfig(prefix="mine", lora=LoraConfig(targets="q_proj,v_proj", rank=4), model=source)
    base = find_base(source, 0)
    run = tmp_path / "results" / config.run_id
    spec = ModelSpec(load_model_config(snapshot), config.lora, "float32")
    extra = {"run_id": config.run_id, "step": 20}
    export_adapter(
        run / "selected",
        spec,
        init_lora(spec, 0),
        str(snapshot),
        seed=0,
        extra=extra,
        base_fingerprint=base.fingerprint(),
    )
    rows = {"path": "/home/me/secret place/rows`|.jsonl", "rows": 180, "tokens": 9000, "sha256": "c0ffee"}
    manifest = {
        "config": to_dict(config),
        "base": {"path": str(snapshot), "fingerprint": base.fingerprint()},
        "dataset": {"train": rows, "validation": rows | {"rows": 20}},
        "device": {"kind": "TPU v5e", "count": 8},
    }
    nll = {10: 0.5, 20: 0.375}
    summary = {
        "run_id": config.run_id, "status": "completed", "selected_step": 20, "train_token_count": 18000,
        "validations": [{"step": step, "mean_nll": value} for step, value in nll.items()],
    }  # fmt: skip
    (run / "manifest.json").write_text(json.dumps(manifest))
    (run / "summary.json").write_text(json.dumps(summary))
    losses = [metric_record(split="train", step=i, loss=1 / i, token_count=900) for i in range(1, 21)]
    losses += [metric_record(split="validation", step=step, loss=value) for step, value in nll.items()]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in losses))
    for folder, accuracy in ((tmp_path / "results" / "mine-base", 0.25), (run, 0.75)):
        (folder / "evaluation").mkdir(parents=True)
        scores = {"status": "completed", "dataset": "quiz.csv", "total": 40, "rule": "last_number"}
        scores |= {"accuracy": accuracy, "accuracy_numeric": accuracy}
        (folder / "evaluation" / "summary.json").write_text(json.dumps(scores))
    return run


def test_the_card_says_what_the_records_say(run, tmp_path, export):
    code, _, errors = export("--run", run, "--out", tmp_path / "out", "--license", "apache-2.0")
    assert code == 0, errors
    text = (tmp_path / "out" / "README.md").read_text()
    assert ModelCard(text).data.to_dict() == {  # as the Hub reads it
        "license": "apache-2.0",
        "pipeline_tag": "text-generation",
        "library_name": "peft",
        "base_model": "owner/Base-1B",
        "base_model_relation": "adapter",
        "tags": ["jaxlora", "lora"],
    }
    for expected in (
        "rank 4 and alpha 32 on q_proj, v_proj of `owner/Base-1B`, the checkpoint of step 20",
        "| train | `rows'/.jsonl` | 180 | 9000 | `c0ffee` |",
        "| 10 | 0.50000 |",
        "| 20 (selected) | 0.37500 |",
        "| 1 to 2 | 0.75000 |",
        "| base | `quiz.csv` | 40 | `last_number` | 0.25000 | 0.25000 |",
        "| this | `quiz.csv` | 40 | `last_number` | 0.75000 | 0.75000 |",
        "| device | `8 x TPU v5e` |",
        'vllm serve "owner/Base-1B" --enable-lora',
        'PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("owner/Base-1B")',
        'jaxlora.load("owner/Base-1B").open(',
    ):
        assert expected in text, expected
    assert "secret place" not in text
    assert str(tmp_path) not in text
    assert PeftConfig.from_pretrained(tmp_path / "out").base_model_name_or_path == "owner/Base-1B"
    export("--run", run, "--out", tmp_path / "again", "--license", "apache-2.0")
    assert (tmp_path / "again" / "README.md").read_text() == text


def test_records_that_contradict_each_other_make_no_card(run, tmp_path, export):
    file = run / "summary.json"
    file.write_text(file.read_text().replace("0.375", "0.374"))
    code, _, errors = export("--run", run, "--out", tmp_path / "out")
    assert code == 2
    assert "contradict each other (validation of step 20: 0.375 and 0.374)" in errors
    assert not (tmp_path / "out").exists()


def test_a_merged_model_has_one_too_and_an_export_goes_on(run, tmp_path, export):
    words = ("--run", run, "--out", tmp_path / "out", "--base-name", "other/Name")
    assert export(*words)[0] == 0
    code, _, errors = export(*words, "--merged", tmp_path / "merged")  # as after one that was stopped
    assert code == 0, errors
    for folder, relation in (("out", "adapter"), ("merged", "finetune")):
        head = yaml.safe_load((tmp_path / folder / "README.md").read_text().split("---")[1])
        assert (head["base_model"], head["base_model_relation"]) == ("other/Name", relation)
        assert head["license"] == "unknown"
    assert "`other/Name` with a LoRA adapter" in (tmp_path / "merged" / "README.md").read_text()


@pytest.mark.parametrize("umask", [0o027, 0o002])
def test_permissions_are_those_of_the_umask(run, tmp_path, export, umask):
    old = os.umask(umask)
    try:
        assert export("--run", run, "--out", tmp_path / "out", "--merged", tmp_path / "merged")[0] == 0
    finally:
        os.umask(old)
    for folder in (tmp_path / "out", tmp_path / "merged"):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o777 & ~umask
        assert {stat.S_IMODE(file.stat().st_mode) for file in folder.iterdir()} == {0o666 & ~umask}


class TestPushing:
    @pytest.fixture
    def hub(self, monkeypatch):
        """What stands in for the Hub: repositories by name, and what was asked of it."""
        hub = SimpleNamespace(repositories={}, calls=[])

        class Api:
            def repo_info(self, name):
                hub.calls.append("look")
                if name not in hub.repositories:
                    response = SimpleNamespace(status_code=404, headers={}, request=None)
                    raise RepositoryNotFoundError(f"404 for {KEY}", response=response)
                return SimpleNamespace(private=hub.repositories[name])

            def create_repo(self, name, private):
                hub.calls.append("create")
                hub.repositories[name] = private

            def upload_folder(self, *, repo_id, folder_path, commit_message):
                hub.calls.append(sorted(os.listdir(folder_path)))

        monkeypatch.setattr(huggingface_hub, "HfApi", Api)
        monkeypatch.setenv("HF_TOKEN", KEY)
        return hub

    def test_a_new_repository_is_private_and_gets_the_whole_folder(self, run, tmp_path, export, hub):
        code, printed, errors = export("--run", run, "--out", tmp_path / "out", "--push", "me/mine")
        assert code == 0, errors
        files = ["README.md", "adapter_config.json", "adapter_model.safetensors", "jaxlora.json"]
        assert hub.calls == ["look", "create", files]
        assert hub.repositories == {"me/mine": True}
        assert "https://huggingface.co/me/mine, private" in printed
        assert KEY not in printed + "".join(
            p.read_text(errors="ignore") for p in (tmp_path / "out").iterdir()
        )

    def test_with_merged_the_merged_model_is_pushed(self, run, tmp_path, export, hub):
        words = ("--merged", tmp_path / "merged", "--push", "me/mine", "--public")
        assert export("--run", run, "--out", tmp_path / "out", *words)[0] == 0
        assert "model.safetensors.index.json" in hub.calls[-1]
        assert hub.repositories == {"me/mine": False}

    def test_without_the_option_nothing_is_asked(self, run, tmp_path, export, hub):
        assert export("--run", run, "--out", tmp_path / "out")[0] == 0
        assert hub.calls == []

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (("--push", "mine"), "--push: 'mine' is not OWNER/NAME"),
            (("--push", "me/open"), "me/open is a public repository; confirm with --public"),
            (("--public",), "--public needs --push"),
            (("--push", "me/mine", "--base-name", "/models/x"), "the base has no name on the Hub"),
            (("--license", "Mine!"), "--license: 'Mine!' is not the name of a licence"),
        ],
    )
    def test_what_must_not_be_is_one_line_before_anything_is_written(
        self, run, tmp_path, export, hub, words, message
    ):
        hub.repositories["me/open"] = False
        code, _, errors = export("--run", run, "--out", tmp_path / "out", *words)
        assert code == 2
        assert message in " ".join(errors.split())
        assert not (tmp_path / "out").exists()

    def test_a_failure_names_no_key_and_keeps_the_folder(self, run, tmp_path, export, hub, monkeypatch):
        def fail(self, **_):
            raise OSError(f"403 Forbidden for {KEY}")

        monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", fail)
        code, printed, errors = export("--run", run, "--out", tmp_path / "out", "--push", "me/mine")
        assert code == 2
        assert "403 Forbidden for <" in errors
        assert KEY not in printed + errors
        assert (tmp_path / "out" / "README.md").is_file()

    def test_no_key_is_one_line(self, run, tmp_path, export, monkeypatch):
        monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
        code, _, errors = export("--run", run, "--out", tmp_path / "out", "--push", "me/mine")
        assert (code, "export HF_TOKEN" in errors) == (2, True)
