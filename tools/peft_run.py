"""Repeat a training run with Transformers, PEFT and torch.optim.AdamW, and compare the two.

    python tools/peft_run.py --run results/smollm2-gsm8k-all_layer-seed-0 --out peft-run

The run's manifest supplies the rows, their order, the learning rates and the initial adapter, which PEFT
reads in its own format; forward and backward passes, optimizer and decoding are PyTorch's. `metrics.jsonl`
gets the losses, `predictions.jsonl` the greedy answers of the checkpoint with the lowest validation NLL, and
`summary.json` both runs' figures. Needs `torch`, `transformers` and `peft`.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, GenerationConfig

os.environ["JAX_PLATFORMS"] = "cpu"  # JAX only reads the rows; the GPU is PyTorch's

from jaxlora.checkpoints.peft import export_adapter
from jaxlora.config import MeshConfig, from_dict
from jaxlora.data.render import RenderedRow, shifted
from jaxlora.evals.gsm8k import aggregate, score
from jaxlora.evals.run import load_prompts
from jaxlora.runtime.errors import UserError, run_main
from jaxlora.runtime.records import read_manifest, read_metrics
from jaxlora.train.job import Job, fresh_state, prepare
from jaxlora.train.schedule import learning_rate
from jaxlora.train.selection import select_checkpoint

ROWS_A_TIME = 32  # in a validation batch
ANSWERS_A_TIME = 512


def job_of(run: Path) -> Job:
    """The run's rows, plan and model, from its manifest.

    Raises:
      UserError: it is not a run of a fresh adapter over an unrounded base, or its data is missing.
    """
    config = from_dict(read_manifest(run)["config"])
    if config.train.what != "lora" or config.model.base_dtype or config.lora.start:
        raise UserError(f"{run}: only runs of a fresh adapter over a base in its own dtype can be compared")
    model = replace(config.model, attention="xla")
    return prepare(replace(config, model=model, mesh=MeshConfig()))


def load_model(job: Job, folder: Path, device: str) -> PeftModel:
    """PEFT's model with the run's initial adapter, which is written to `folder`."""
    export_adapter(
        folder,
        job.spec,
        fresh_state(job).trained,
        job.config.model.path,
        seed=job.config.seed,
        overwrite=True,
    )
    dtype = getattr(torch, job.config.model.dtype)
    base = AutoModelForCausalLM.from_pretrained(job.base.folder, dtype=dtype, attn_implementation="sdpa")
    return PeftModel.from_pretrained(base.to(device), folder, is_trainable=True).to(device).eval()


def summed_nll(model: torch.nn.Module, rows: Sequence[RenderedRow], device: str) -> torch.Tensor:
    """Sum over weighted targets of -log p; padding is on the right, where causal attention never looks."""
    length = max(row.n_tokens for row in rows)
    tokens, targets = np.zeros((2, len(rows), length), np.int64)
    weights = np.zeros((len(rows), length), np.float32)
    for i, row in enumerate(rows):
        tokens[i, : row.n_tokens], targets[i, : row.n_tokens], weights[i, : row.n_tokens] = shifted(row)
    inputs, wanted, own = (torch.from_numpy(x).to(device) for x in (tokens, targets, weights))
    logits = model(input_ids=inputs, use_cache=False).logits
    chosen = own != 0
    nll = torch.nn.functional.cross_entropy(logits[chosen].float(), wanted[chosen], reduction="none")
    return (own[chosen] * nll).sum()


def weight_of(rows: Sequence[RenderedRow]) -> float:
    return float(sum(row.weights[1:].sum() for row in rows))


@torch.no_grad()
def validation_nll(model: torch.nn.Module, rows: Sequence[RenderedRow], device: str) -> float:
    """The mean over all weighted targets."""
    ordered = sorted(rows, key=lambda row: row.n_tokens)
    parts = [ordered[i : i + ROWS_A_TIME] for i in range(0, len(ordered), ROWS_A_TIME)]
    return float(sum(summed_nll(model, part, device).item() for part in parts) / weight_of(rows))


def train(model: PeftModel, job: Job, device: str, steps: int) -> Iterator[dict[str, Any]]:
    """Train according to the run's plan; yields a record of each step and each validation."""
    optim, plan = job.config.optim, job.plan
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    adam = torch.optim.AdamW(
        trained, betas=(optim.b1, optim.b2), eps=optim.eps, weight_decay=optim.weight_decay
    )
    for step in range(1, steps + 1):
        rows = [job.train_rows[i] for i in plan.rows_of_step(step)]
        adam.zero_grad()
        total = summed_nll(model, rows, device)
        total.backward()
        if optim.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(trained, optim.clip_norm)
        for group in adam.param_groups:
            group["lr"] = learning_rate(step, optim, plan)
        adam.step()
        yield {"split": "train", "step": step, "loss": total.item() / weight_of(rows)}
        if step in plan.validation_steps or step == steps:
            yield {
                "split": "validation",
                "step": step,
                "loss": validation_nll(model, job.validation_rows, device),
            }


@torch.no_grad()
def answers(model: torch.nn.Module, job: Job, device: str) -> list[dict[str, Any]]:
    """Greedy answers to the run's benchmark, scored like the run's own evaluation."""
    tokenizer, settings = job.tokenizer, job.config.eval
    problems, prompts = load_prompts(job.config, tokenizer)
    stops = job.base.stop_ids(tokenizer)
    greedy = GenerationConfig(
        max_new_tokens=settings.max_new_tokens,
        do_sample=False,
        eos_token_id=list(stops),
        pad_token_id=stops[0],
    )
    records: dict[int, dict[str, Any]] = {}
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for start in range(0, len(order), ANSWERS_A_TIME):
        part = order[start : start + ANSWERS_A_TIME]
        length = max(len(prompts[i]) for i in part)
        padded = torch.full((len(part), length), stops[0])
        mask = torch.zeros_like(padded)
        for row, i in enumerate(part):
            padded[row, length - len(prompts[i]) :] = torch.tensor(prompts[i])
            mask[row, length - len(prompts[i]) :] = 1
        found = model.generate(
            input_ids=padded.to(device), attention_mask=mask.to(device), generation_config=greedy
        )
        for i, new in zip(part, found[:, length:].tolist(), strict=True):
            end = next((at for at, token in enumerate(new) if token in stops), None)
            text = str(tokenizer.decode(new[:end]))
            used = len(new) if end is None else end + 1
            reason = "length" if end is None else "stop"
            records[i] = score(problems[i], text, len(prompts[i]), used, reason)
        print(f"{len(records)} answers, {sum(r['correct'] for r in records.values())} right", flush=True)
    return [records[i] for i in range(len(prompts))]


def of_run(run: Path) -> dict[str, Any]:
    """What the run itself has recorded so far."""
    rows = read_metrics(run) if (run / "metrics.jsonl").is_file() else []
    evaluation = run / "evaluation" / "summary.json"
    score_of = json.loads(evaluation.read_text()) if evaluation.is_file() else {}
    return {
        "train_nll": {row["step"]: row["loss"] for row in rows if row["split"] == "train"},
        "validation_nll": {row["step"]: row["loss"] for row in rows if row["split"] == "validation"},
        "accuracy": score_of.get("accuracy"),
    }


def compare(run: Path, own: list[dict[str, Any]], scored: list[dict[str, Any]] | None) -> dict[str, Any]:
    """Both runs' figures side by side."""
    theirs = of_run(run)
    lines = [record for record in own if record["split"] == "validation"]
    total = None if scored is None else aggregate(scored)
    steps = [r for r in own if r["split"] == "train" and r["step"] in theirs["train_nll"]]
    return {
        "run": run.name,
        "validation_nll": [
            {"step": r["step"], "peft": r["loss"], "jaxlora": theirs["validation_nll"].get(r["step"])}
            for r in lines
        ],
        "largest_difference_of_a_step": max(
            (abs(r["loss"] - theirs["train_nll"][r["step"]]) for r in steps), default=None
        ),
        "accuracy": {"peft": None if total is None else total["accuracy"], "jaxlora": theirs["accuracy"]},
        "totals": total,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument(
        "--run",
        type=Path,
        required=True,
        metavar="DIR",
        help="directory of the run, which need not be finished",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the results")
    parser.add_argument("--steps", type=int, metavar="N", help="stop after this many steps (default: all)")
    parser.add_argument("--no-answers", action="store_true", help="train and validate only")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    options.out.mkdir(parents=True, exist_ok=True)
    job = job_of(options.run)
    model = load_model(job, options.out / "initial", device)
    steps = min(options.steps or job.plan.total_steps, job.plan.total_steps)
    records, best, begun = [], {}, time.monotonic()
    with (options.out / "metrics.jsonl").open("w") as file:
        for record in train(model, job, device, steps):
            records.append(record)
            file.write(json.dumps(record) + "\n")
            file.flush()
            if record["split"] == "validation":
                print(f"step {record['step']}: validation NLL {record['loss']:.5f}", flush=True)
                nll = {r["step"]: r["loss"] for r in records if r["split"] == "validation"}
                if select_checkpoint(nll) == record["step"]:
                    best = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    print(f"{steps} steps in {time.monotonic() - begun:.0f} s", flush=True)
    scored = None
    if not options.no_answers:
        model.load_state_dict(best, strict=False)
        scored = answers(model.merge_and_unload(), job, device)
        lines = "".join(json.dumps(record) + "\n" for record in scored)
        (options.out / "predictions.jsonl").write_text(lines)
    summary = compare(options.run, records, scored)
    (options.out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    print(json.dumps(summary, indent=2))


if __name__ == "__main__":
    run_main(main)
