"""An adapter that was trained on a rounded base belongs to it: saved, opened, merged and refused as such."""

from __future__ import annotations

import json

import numpy as np
import pytest
from helpers.hf_models import make_checkpoint

import jaxlora
from jaxlora.config import RunConfig, from_dict
from jaxlora.evals.subjects import with_own_base_dtype
from jaxlora.runtime.errors import UserError

ROWS = [{"tokens": [3, 5, 7, 9, 11, 4], "weights": [0, 0, 1, 1, 1, 1]}]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    make_checkpoint(folder, intermediate_size=128, num_hidden_layers=1)
    return folder


def test_an_adapter_records_its_rounded_base_and_another_is_refused(base, tmp_path, monkeypatch):
    trainer = jaxlora.load(str(base), base_dtype="int8").lora(rank=2)
    monkeypatch.setattr("jaxlora.checkpoints.base.Base.tokenizer_folder", lambda _: None)
    trainer.forward_backward(ROWS)
    trainer.optim_step(learning_rate=1e-2)
    trainer.save(tmp_path / "adapter")
    recorded = json.loads((tmp_path / "adapter" / "jaxlora.json").read_text())
    assert (recorded["base_dtype"], recorded["base_products"]) == ("int8", "weights")

    again = jaxlora.load(str(base), base_dtype="int8").open(tmp_path / "adapter")
    np.testing.assert_array_equal(again.logprobs(ROWS)[0], trainer.logprobs(ROWS)[0])
    for other in (None, "nf4"):
        with pytest.raises(UserError, match=r"trained on its base in int8.*give base_dtype=int8"):
            jaxlora.load(str(base), base_dtype=other).open(tmp_path / "adapter")
    source = RunConfig().model
    assert with_own_base_dtype(source, tmp_path / "adapter").base_dtype == "int8"
    asked = from_dict({"model": {"base_dtype": "nf4"}}).model
    assert with_own_base_dtype(asked, tmp_path / "adapter").base_dtype == "nf4"


def test_a_rounded_base_is_not_trained_whole(base):
    with pytest.raises(UserError, match="cannot be fully fine-tuned"):
        jaxlora.load(str(base), base_dtype="nf4").full()


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"model": {"base_dtype": "int3"}}, r"model.base_dtype.*bfloat16 \| float8 \| int8 \| nf4"),
        ({"model": {"base_dtype": "nf4"}, "train": {"what": "full"}}, "train.what=full"),
        ({"model": {"base_dtype": "nf4", "base_products": "both"}}, "base_products: nf4"),
        ({"model": {"base_products": "both"}}, "without model.base_dtype"),
        ({"model": {"base_dtype": "bfloat16", "dtype": "float32"}}, "model.dtype=bfloat16"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(values, words):
    with pytest.raises(UserError, match=words):
        from_dict(values)
