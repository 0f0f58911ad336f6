"""The base of the Tinker parity tests, and the script that records the fixtures from a local server.

python tests/helpers/tinker_recording.py --out DIR      # base, recording.json, policy.json, their adapters
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from helpers.hf_models import make_checkpoint
from helpers.tinker_server import local_server
from jaxlora.data.render import RenderedRow, load_tokenizer
from jaxlora.data.rows import load_rendered_rows
from jaxlora.parity.policy import PolicySettings, record_policy
from jaxlora.parity.recording import Settings, record
from jaxlora.parity.tinker_service import TinkerBackend
from jaxlora.runtime.remote import embedded_path

TOKENIZER = load_tokenizer("embedded:base")
SETTINGS = Settings(conditions=("all_layer",), reduction="sequence_mean")
POLICY = PolicySettings(reduction="length_mean")
ROPE_THETA = 500_000.0  # neither of the usual values, so that one of them taken by mistake would show


def make_base(folder: Path, seed: int = 11) -> Path:
    """A random float32 Qwen3 with the embedded tokenizer, as Transformers 4 and 5 read it."""
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 8}
    make_checkpoint(folder, seed=seed, vocab_size=len(TOKENIZER), rope_theta=ROPE_THETA, **shape)
    config = json.loads((folder / "config.json").read_text())
    config |= {"rope_theta": ROPE_THETA, "max_position_embeddings": 2048}  # version 4 reads it here
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(embedded_path("base") / name, folder / name)
    return folder


def embedded_rows() -> list[RenderedRow]:
    """The first rows of the embedded training data."""
    rows, _ = load_rendered_rows(
        "embedded:data/train.jsonl", TOKENIZER, max_length=4096, on_bad_row="error", limit=40
    )
    return rows


def policy_prompts() -> list[list[int]]:
    """Prompts whose answers are drawn."""
    return [row.tokens[: row.prompt_length].tolist() for row in embedded_rows()[:2]]


@contextmanager
def local_service(base: Path, scratch: Path) -> Iterator[TinkerBackend]:
    """A local server for this base, and the SDK's client to it. The environment is put back afterwards."""
    before = {name: os.environ.get(name) for name in ("TINKER_BASE_URL", "TINKER_API_KEY")}
    with local_server(base, scratch) as url:
        os.environ |= {"TINKER_BASE_URL": url, "TINKER_API_KEY": "tml-local"}
        try:
            yield TinkerBackend(str(base.resolve()))
        finally:
            for name, value in before.items():
                os.environ.pop(name) if value is None else os.environ.update({name: value})


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    out = parser.parse_args().out
    with tempfile.TemporaryDirectory() as scratch:
        base = make_base(Path(scratch) / "base")
        with local_service(base, Path(scratch) / "server") as backend:
            out.mkdir(parents=True, exist_ok=True)
            stop = TOKENIZER.eos_token_id
            record(backend, embedded_rows(), SETTINGS, out / "recording.json", "base", stop)
            record_policy(backend, policy_prompts(), POLICY, out / "policy.json", "base", stop)
        (out / "base").mkdir()
        for name in ("config.json", "model.safetensors"):
            shutil.copy(base / name, out / "base" / name)


if __name__ == "__main__":
    main()
