"""Coverage-guided fuzzing of the readers that take raw bytes, with atheris. Prints how many inputs it ran.

python tests/helpers/fuzz_bytes.py safetensors SECONDS      # or: row, prediction, latex, answer

A reader may refuse its input with `UserError` or `ValueError`. Anything else ends the run with exit code 77.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["jaxlora"]):
    from jaxlora.checkpoints.tensors import read_header
    from jaxlora.data.boxes import extract_boxed
    from jaxlora.data.mathml import text_to_html
    from jaxlora.data.rows import parse_rendered
    from jaxlora.evals.answers import numeric_match, strict_match
    from jaxlora.evals.gsm8k import rescore
    from jaxlora.runtime.errors import UserError

SCRATCH = Path(tempfile.mkdtemp(prefix="jaxlora-fuzz-"))


def safetensors(data: bytes) -> None:
    length = int.from_bytes(data[:2], "little") % 300
    file = SCRATCH / "model.safetensors"
    file.write_bytes(length.to_bytes(8, "little") + data[2:])
    for tensor in read_header(str(file)):
        if tensor.shape:
            tensor.rows(0, tensor.shape[0])


def row(data: bytes) -> None:
    assert parse_rendered(data)["row_id"]


def prediction(data: bytes) -> None:
    (SCRATCH / "predictions.jsonl").write_bytes(data)
    rescore(SCRATCH / "predictions.jsonl")


def latex(data: bytes) -> None:
    assert "<script" not in text_to_html(data.decode("utf-8", "replace")).lower()


def answer(data: bytes) -> None:
    text = data.decode("utf-8", "replace")
    found = extract_boxed(text) or text
    if strict_match(found, "4"):
        assert numeric_match(found, "4")


TARGETS: dict[str, Callable[[bytes], None]] = {
    target.__name__: target for target in (safetensors, row, prediction, latex, answer)
}
SEEDS = {
    "safetensors": b'\x40\x00{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}          12345678',
    "row": b'{"messages":[{"role":"user","content":"a"},{"role":"assistant","content":"b"}]}',
    "prediction": b'{"generated_text":"\\\\boxed{4}","reference_answer":"4","stop_reason":"stop"}\n',
    "latex": rb"so $\frac{1}{2}$ and \[x^2\] \boxed{\text{4}}",
    "answer": rb"\boxed{\frac{1}{2}\text{ km}}",
}


def main() -> None:
    name, seconds = sys.argv[1], sys.argv[2]
    corpus = SCRATCH / "corpus"
    corpus.mkdir()
    (corpus / "seed").write_bytes(SEEDS[name])

    def one_input(data: bytes) -> None:
        try:
            TARGETS[name](data)
        except (UserError, ValueError):
            return

    limits = [f"-max_total_time={seconds}", "-timeout=20", "-rss_limit_mb=4096", "-max_len=4096"]
    atheris.Setup([sys.argv[0], *limits, f"-artifact_prefix={SCRATCH}/", str(corpus)], one_input)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
