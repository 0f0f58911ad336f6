"""Evaluate a base or an adapter on GSM8K or any questions: prompts, greedy decoding, scores, records on disk.

summary = evaluate(config, subject, spec, trained, frozen, base, out_dir)
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from rich.markup import escape
from rich.table import Table

from jaxlora.checkpoints.base import Base
from jaxlora.config import RunConfig
from jaxlora.data.render import SYSTEM_PROMPT, Tokenizer, render_prompts
from jaxlora.evals.earlier import earlier_lengths
from jaxlora.evals.gsm8k import Problem, aggregate, load_problems, load_questions, score
from jaxlora.evals.rules import rule_named
from jaxlora.generate.decode import generate
from jaxlora.generate.weights import decode_weights
from jaxlora.models.attention import decode_backend
from jaxlora.models.decoder import ModelSpec, Tree
from jaxlora.models.spec import check_positions
from jaxlora.runtime import hosts
from jaxlora.runtime.files import read_json, sha256_of
from jaxlora.runtime.folders import replace_together
from jaxlora.runtime.progress import console, progress_bar
from jaxlora.runtime.records import metric_record, summary_record
from jaxlora.runtime.text import harmless
from jaxlora.train.board import write_outcome


@dataclass(frozen=True)
class Subject:
    """What is evaluated. The base has no condition, seed or checkpoint; an adapter always has a condition."""

    run_id: str
    condition: str | None = None
    seed: int | None = None
    checkpoint: str | None = None
    adapter_sha256: str | None = None  # of the trained weights
    base_fingerprint: str | None = None


def evaluation_inputs(
    config: RunConfig, subject: Subject, problems: list[Problem], prompts: list[list[int]]
) -> dict[str, Any]:
    """Everything that determines the answers, as recorded in the summary.

    The benchmark is identified by the SHA-256 of its questions and references, not by name; tokenizer and
    chat template are identified by that of the prompts' token ids.
    """
    texts = [[problem.question, problem.reference_answer] for problem in problems]
    return {
        **dataclasses.asdict(subject),
        "benchmark_sha256": hashlib.sha256(json.dumps(texts).encode()).hexdigest(),
        "prompts_sha256": hashlib.sha256(json.dumps(prompts).encode()).hexdigest(),
        "dtype": config.model.dtype,
        **({} if config.model.base_dtype is None else {"base_dtype": config.model.base_dtype}),
        "max_new_tokens": config.eval.max_new_tokens,
        "merged": config.eval.merge_adapter if subject.condition not in (None, "full") else None,
        "system_prompt": system_prompt(config),
        **({} if config.eval.rule is None else {"rule": config.eval.rule}),
    }


def why_redo(out_dir: Path, inputs: dict[str, Any]) -> str | None:
    """Why the evaluation in `out_dir` is not valid for these inputs, in words; None if it is valid."""
    if not (out_dir / "summary.json").is_file():
        return "missing"
    summary, predictions = read_json(out_dir / "summary.json"), out_dir / "predictions.jsonl"
    if not isinstance(summary, dict) or summary.get("status") != "completed":
        return "unfinished"
    if different := [name for name, value in inputs.items() if summary.get(name) != value]:
        return f"of another {', '.join(different)}"
    if not predictions.is_file() or sha256_of(predictions) != summary.get("predictions_sha256"):
        return "its predictions have changed since"
    return None


def load_prompts(config: RunConfig, tokenizer: Tokenizer) -> tuple[list[Problem], list[list[int]]]:
    """The benchmark's problems and their prompts as token ids."""
    settings = config.eval
    if settings.rule is None:
        problems = load_problems(config.benchmark, settings.problems)
    else:
        columns = dict(pair.split("=", 1) for pair in settings.columns)
        problems = load_questions(config.benchmark, rule_named(settings.rule), columns, settings.problems)
    questions = [problem.question for problem in problems]
    return problems, render_prompts(tokenizer, questions, system_prompt(config))


def system_prompt(config: RunConfig) -> str | None:
    """The configured system prompt; if none is set, the study's, but only when scoring by its rule."""
    return config.eval.system or (SYSTEM_PROMPT if config.eval.rule is None else None)


def check_lengths(config: RunConfig, base: Base, prompts: list[list[int]]) -> None:
    """Refuse answers that exceed the model's positions, before its weights are loaded (`UserError`)."""
    longest = max(map(len, prompts)) + config.eval.max_new_tokens
    check_positions(base.config, longest, "config.eval.max_new_tokens: the longest prompt and its answer")


def evaluate(
    config: RunConfig,
    subject: Subject,
    spec: ModelSpec,
    trained: Tree,
    frozen: Tree,
    base: Base,
    out_dir: Path,
    tokenizer: Tokenizer | None = None,
) -> dict[str, Any]:
    """Decode and score the benchmark; write `predictions.jsonl`, `metrics.jsonl` and `summary.json`.

    With several processes, all decode together and process 0 writes.

    Args:
      tokenizer: the base's, if already loaded.
      trained, frozen: the trained weights (`{}` for the untouched base) and the base, matching `spec`.

    Returns:
      The summary.
    """
    tokenizer = base.tokenizer() if tokenizer is None else tokenizer
    problems, prompts = load_prompts(config, tokenizer)
    check_lengths(config, base, prompts)
    inputs = evaluation_inputs(config, subject, problems, prompts)
    stop_ids = base.stop_ids(tokenizer)
    found = earlier_lengths(Path(config.results_dir), inputs["prompts_sha256"], out_dir)
    expected = hosts.broadcast(found if found is not None and len(found) == len(prompts) else None)
    start = time.monotonic()
    spec, lora, weights, mesh = decode_weights(spec, trained, frozen, merge=config.eval.merge_adapter)
    progress = progress_bar(f"decoding {subject.run_id}", len(prompts), "problems")
    with jax.set_mesh(mesh), progress as advance:
        answers = generate(
            spec,
            lora,
            weights,
            prompts,
            stop_ids=stop_ids,
            max_new_tokens=config.eval.max_new_tokens,
            slots=config.eval.batch_rows,
            backend=decode_backend(spec.dtype),
            expected=expected,
            progress=advance,
        )
    seconds = time.monotonic() - start
    records = []
    rule = None if config.eval.rule is None else rule_named(config.eval.rule)
    for problem, prompt, answer in zip(problems, prompts, answers, strict=True):
        ids = answer.tokens[:-1] if answer.stop_reason == "stop" else answer.tokens
        text = str(tokenizer.decode(ids))
        records.append(score(problem, text, len(prompt), len(answer.tokens), answer.stop_reason, rule))
    facts = inputs | {"first_prompt": tokenizer.decode(prompts[0]), "stop_token_ids": list(stop_ids)}
    return hosts.broadcast(_write(out_dir, config.benchmark, subject, records, facts, seconds))


def _write(
    out_dir: Path,
    dataset: str,
    subject: Subject,
    records: list[dict[str, Any]],
    facts: dict[str, Any],
    seconds: float,
) -> dict[str, Any]:
    """Write the scored answers, their totals and the summary, if this is process 0; return the summary."""
    totals = aggregate(records)
    identity = {
        "run_id": subject.run_id,
        "checkpoint": subject.checkpoint,
        "condition": subject.condition,
        "seed": subject.seed,
    }
    tokens = totals["prompt_tokens"] + totals["generated_tokens"]
    summary = summary_record(
        **identity,
        dataset=dataset,
        primary_metric={"name": "accuracy_strict", "value": totals["accuracy"]},
        artifact_paths={"predictions": "predictions.jsonl", "metrics": "metrics.jsonl"},
        status="completed",
        token_count=tokens,
        **totals,
        **{name: value for name, value in facts.items() if name not in identity},
        seconds=seconds,
        generated_tokens_per_second=totals["generated_tokens"] / seconds,
    )
    metric = metric_record(
        **identity,
        split="test",
        eval_metric=totals["accuracy"],
        token_count=tokens,
        **totals,
        seconds=seconds,
    )
    if not hosts.is_main():
        return summary
    predictions = _jsonl(records)
    summary["predictions_sha256"] = hashlib.sha256(predictions).hexdigest()
    replace_together(
        out_dir,
        {
            "predictions.jsonl": predictions,
            "metrics.jsonl": _jsonl([metric]),
            "summary.json": (
                json.dumps(summary, ensure_ascii=False, allow_nan=False, indent=2) + "\n"
            ).encode(),
        },
    )
    if (curves := out_dir.parent / "tensorboard").is_dir():  # the run's own evaluation
        scores = {"strict": totals["accuracy"], "numeric": totals["accuracy_numeric"]}
        outcome = {f"final/accuracy_{name}": value for name, value in scores.items()}
        step = (subject.checkpoint or "").removeprefix("step-")
        write_outcome(curves, outcome, int(step) if step.isdigit() else 0)
    return summary


def _jsonl(records: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(x, ensure_ascii=False, allow_nan=False) + "\n" for x in records).encode()


def show(summaries: list[dict[str, Any]]) -> None:
    """Print scores side by side, with the figures needed to judge them."""
    problems = " and ".join(sorted({str(s["total"]) for s in summaries}))
    table = Table(title=f"greedy answers to {problems} problems", title_justify="left")
    rules = {s.get("rule") for s in summaries}
    strict, none = ("strict", "no box") if rules == {None} else ("right", "no answer")
    for name in ("", strict, "numeric", none, "cut off", "tokens/s"):
        table.add_column(name, justify="right" if name else "left", no_wrap=bool(name), overflow="fold")
    for s in summaries:
        table.add_row(
            escape(s["run_id"]),
            f"{s['accuracy']:.2%}",
            f"{s['accuracy_numeric']:.2%}",
            f"{s['extraction_failure_rate']:.2%}",
            f"{s['truncation_rate']:.2%}",
            f"{s['generated_tokens_per_second']:,.0f}",
        )
    console.print(table)
    if affected := max(s.get("references_with_separators", 0) for s in summaries):
        wrong = ", ".join(f"{s['run_id']} {s['wrong_by_separators']}" for s in summaries)
        note = f"{affected} references have a thousands separator; wrong for nothing but its lack"
        console.print(f"{note}: {harmless(wrong)}", markup=False)
