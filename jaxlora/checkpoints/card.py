"""The model card (`README.md`) of an exported model, generated only from the run's own records.

    text = model_card(selected, "adapter", base="Qwen/Qwen3-8B", license_name="apache-2.0")

The same run gives the same card, byte for byte. Text from records is shown as code, so no name or path can
change the page's layout; only the last part of local paths is shown.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from jaxlora.checkpoints.export import Selected
from jaxlora.runtime.errors import UserError
from jaxlora.runtime.files import Record, read_object
from jaxlora.runtime.records import contradiction, read_manifest, read_metrics, read_summary
from jaxlora.runtime.remote import cached_name, is_hub_name
from jaxlora.runtime.text import harmless, without_secrets

Kind = Literal["adapter", "merged", "model"]
POINTS = 10  # on the training curve
_LICENSE = re.compile(r"[a-z0-9][a-z0-9.+-]{0,63}")


def base_name(selected: Selected, given: str | None = None) -> str:
    """The public name of the base: the name given, its Hub name, or else its path as used by the run."""
    if given is not None:
        return given
    folder = selected.base.folder
    known = None if folder is None else cached_name(folder.resolve())
    return known or str(selected.metadata.get("base_model") or selected.config.model.path)


def model_card(selected: Selected, kind: Kind, base: str, license_name: str | None = None) -> str:
    """The text of the card.

    Args:
      base: as returned by `base_name`.
      license_name: the Hub's name of the licence; None: `unknown`.

    Raises:
      UserError: the licence name is invalid, or a record of the run is broken.
    """
    if license_name is not None and not _LICENSE.fullmatch(license_name):
        raise UserError(
            f"--license: {license_name!r:.80} is not the name of a licence; give one, such as"
            " apache-2.0 or other"
        )
    manifest, summary = read_manifest(selected.run), read_summary(selected.run)
    parts = [
        _head(kind, base, license_name),
        f"# {_plain(selected.config.run_id)}",
        _what(selected, kind, base),
        _loading(kind, base),
        "## Training",
        _table(_training(selected, manifest, summary)),
        _data(manifest),
        _curves(selected.run, summary),
        _scores(selected),
        "Made by jaxlora from the records of the run.",
    ]
    return without_secrets("\n\n".join(part for part in parts if part)) + "\n"


def _head(kind: Kind, base: str, license_name: str | None) -> str:
    values: dict[str, Any] = {"license": license_name or "unknown", "pipeline_tag": "text-generation"}
    values["library_name"] = "peft" if kind == "adapter" else "transformers"
    if is_hub_name(base):
        values["base_model"] = base
        values["base_model_relation"] = "adapter" if kind == "adapter" else "finetune"
    values["tags"] = ["jaxlora", "lora"] if kind != "model" else ["jaxlora"]
    lines = (f"{name}: {json.dumps(value, ensure_ascii=False)}" for name, value in values.items())
    return "\n".join(["---", *lines, "---"])


def _what(selected: Selected, kind: Kind, base: str) -> str:
    step = selected.metadata.get("step")
    if kind == "model":
        return f"All weights of {_code(base)}, trained; the checkpoint of step {step}."
    lora = selected.spec.lora
    assert lora is not None
    text = f"a LoRA adapter of rank {lora.rank} and alpha {lora.alpha:g} on "
    text += ", ".join(weight.name for weight in selected.spec.adapted)
    text += f" of {_code(base)}, the checkpoint of step {step}"
    return f"{_code(base)} with {text}, folded in." if kind == "merged" else f"{text[0].upper()}{text[1:]}."


def _loading(kind: Kind, base: str) -> str:
    where = json.dumps(_shown(base), ensure_ascii=False)
    here = '"PATH_OR_NAME_OF_THIS"'
    if kind == "adapter":
        python = f"""from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained({where}), {here})
tokenizer = AutoTokenizer.from_pretrained({here})"""
        serve = f"vllm serve {where} --enable-lora --lora-modules tuned={here}"
        own = f'import jaxlora\n\ntrainer = jaxlora.load({where}).open("FOLDER_OF_THIS")'
        talk = "jaxlora chat --adapter FOLDER_OF_THIS"
    else:
        python = f"""from transformers import AutoModelForCausalLM, AutoTokenizer

model, tokenizer = (kind.from_pretrained({here}) for kind in (AutoModelForCausalLM, AutoTokenizer))"""
        serve = f"vllm serve {here}"
        own = f"import jaxlora\n\ntrainer = jaxlora.load({here}).untrained()"
        talk = f"jaxlora chat --base --model {here}"
    name = "PEFT" if kind == "adapter" else "Transformers"
    return f"""## Loading

{name}:

```python
{python}
```

vLLM, and a chat with jaxlora:

```bash
{serve}
{talk}
```

jaxlora:

```python
{own}
answer = trainer.sample(["What is 2 + 3?"], max_new_tokens=64)[0].text
```"""


def _training(selected: Selected, manifest: Record, summary: Record) -> Iterator[tuple[str, str]]:
    config, base = selected.config, manifest.get("base") or {}
    optim, train = config.optim, config.train
    yield (
        "base",
        f"{_code(base.get('path', config.model.path))}, fingerprint {_code(base.get('fingerprint'))}",
    )
    yield "base's weights, SHA-256", _code(summary.get("base_weights_sha256"))
    yield "steps", f"{summary.get('last_step') or (manifest.get('schedule') or {}).get('total_steps')}"
    if reason := summary.get("ended_by"):
        yield "ended by", _code(reason)
    yield "rows a step, epochs", f"{train.batch_rows}, {train.epochs}"
    yield "tokens trained on", f"{summary.get('train_token_count')}"
    rate = f"{optim.peak_lr:g}, {optim.schedule}, warm-up {optim.warmup_fraction:g}"
    yield "learning rate", rate
    yield "Adam", f"b1 {optim.b1:g}, b2 {optim.b2:g}, eps {optim.eps:g}, weight decay {optim.weight_decay:g}"
    yield "dropout", f"{config.lora.dropout:g}"
    yield "loss on", f"{config.data.loss_on} answers"
    yield "seed", f"{config.seed}"
    device = manifest.get("device") or {}
    if device:
        yield "device", _code(f"{device.get('count')} x {device.get('kind')}")
    if code := (manifest.get("code") or {}).get("git_sha"):
        yield "code", _code(code)
    packages = manifest.get("packages") or {}
    if packages:
        yield "versions", _code(", ".join(f"{k} {v}" for k, v in packages.items()))
    for name, sha256 in sorted((summary.get("sha256") or {}).items()):
        if name.endswith(".safetensors"):
            yield f"{_plain(Path(name).name)}, SHA-256", _code(sha256)


def _data(manifest: Record) -> str:
    found = manifest.get("dataset") or {}
    if not found:
        return ""
    lines = ["## Data", "| | file | rows | tokens | SHA-256 |", "|---|---|---|---|---|"]
    for name, part in found.items():
        path = str(part.get("path"))
        shown = path if path.startswith(("hf://", "embedded:")) or is_hub_name(path) else Path(path).name
        cells = (
            _plain(name),
            _code(shown),
            f"{part.get('rows')}",
            f"{part.get('tokens')}",
            _code(part.get("sha256")),
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(["\n\n".join(lines[:2]), *lines[2:]])


def _curves(run: Path, summary: Record) -> str:
    """Validation NLL by step, and mean training loss over equal parts of the run."""
    lines = []
    if validations := summary.get("validations"):
        lines += ["## Curves", "", "| step | validation NLL, nats per token |", "|---|---|"]
        best = summary.get("selected_step")
        for row in validations:
            mark = " (selected)" if row["step"] == best else ""
            lines.append(f"| {row['step']}{mark} | {_number(row['mean_nll'])} |")
    steps = []
    if (run / "metrics.jsonl").is_file():
        records = read_metrics(run)
        if text := contradiction(summary, records):
            raise UserError(f"{run}: metrics.jsonl and summary.json contradict each other ({text})")
        steps = [r for r in records if r["split"] == "train" and r.get("loss") is not None]
    if steps:
        lines += ["", "| steps | mean training loss |", "|---|---|"]
        size = -(-len(steps) // POINTS)
        for start in range(0, len(steps), size):
            part = steps[start : start + size]
            mean = sum(row["loss"] for row in part) / len(part)
            lines.append(f"| {part[0]['step']} to {part[-1]['step']} | {mean:.5f} |")
    return "\n".join(lines)


def _scores(selected: Selected) -> str:
    """The run's evaluation beside the base's, as far as they exist."""
    run = selected.run
    folders = {
        "base": run.parent / f"{selected.config.prefix}-base" / "evaluation",
        "this": run / "evaluation",
    }
    lines = []
    for name, folder in folders.items():
        if not (folder / "summary.json").is_file():
            continue
        found = read_object(folder / "summary.json")
        if found.get("status") == "completed" and isinstance(found.get("total"), int):
            rule = found.get("rule") or "strict"
            lines.append(
                f"| {name} | {_code(found.get('dataset'))} | {found['total']} | {_code(rule)} |"
                f" {_number(found.get('accuracy'))} | {_number(found.get('accuracy_numeric'))} |"
            )
    head = [
        "## Scores",
        "",
        "| of | questions | number | rule | accuracy | numeric |",
        "|---|---|---|---|---|---|",
    ]
    return "\n".join([*head, *lines]) if lines else ""


def _table(rows: Iterator[tuple[str, str]]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {text} |" for name, text in rows)])


def _number(value: Any) -> str:
    return f"{value:.5f}" if isinstance(value, int | float) else "-"


def _shown(value: Any) -> str:
    """Text on one line; only the last part of a local path."""
    text = harmless(str(value)).replace("\n", " ")
    return Path(text).name if text.startswith(("/", "./", "../", "~")) else text


def _code(value: Any) -> str:
    """Text as code in a table cell: no mark-up, links or cell separators."""
    return "not recorded" if value is None else f"`{_shown(value).replace('`', chr(39)).replace('|', '/')}`"


def _plain(value: Any) -> str:
    """A name in a heading: letters, digits and a few signs."""
    return re.sub(r"[^\w .+-]", "_", str(value))
