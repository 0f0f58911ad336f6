"""The sentences of the report: the question, the verdict, how it was run, and what it cannot say.

Every sentence follows from the comparison and the runs' own records; whatever they do not record is stated.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from jaxlora.runtime.files import Record
from jaxlora.study.results import Study, lowest_nll
from jaxlora.study.tables import interval, percent, points, rate, share, whole
from jaxlora.train.selection import select_learning_rate

_MAX_LIST = 12  # longer lists, such as the row ids of the data, are counted, not shown


def question(study: Study) -> str:
    """The study's question, from the conditions and the model named in its runs."""
    conditions = study.conditions()
    model = next((name for run in study.runs if (name := _model(run.manifest))), None)
    of = f"of {model}" if model else "of a model that no manifest names"
    if len(conditions) < 2:
        return f"How well does a LoRA adapter {of} solve {study.benchmark()}?"
    names = ", ".join(conditions[:-1]) + " or " + conditions[-1]
    return f"Which LoRA adapter {of} solves more of {study.benchmark()}: {names}?"


def _model(manifest: Record) -> str | None:
    return ((manifest.get("config") or {}).get("model") or {}).get("path")


def headline(comparison: dict[str, Any] | None) -> str:
    """The verdict in one line."""
    if comparison is None:
        return "No verdict: no finished evaluation was found."
    if not comparison["pairs"]:
        return "No verdict between conditions: only one was evaluated, or none with the other's settings."
    winners = [pair["strict"]["verdict"] for pair in comparison["pairs"]]
    if set(winners) == {"inconclusive"}:
        return "Inconclusive: no condition is called better."
    if len(winners) == 1:
        return f"{winners[0]} scores higher."
    return "; ".join(
        f"{pair['first']} against {pair['second']}: {pair['strict']['verdict']}"
        for pair in comparison["pairs"]
    )


def verdicts(comparison: dict[str, Any] | None) -> list[str]:
    """The basis of the headline: a paragraph per pair of conditions and per gain over the base."""
    if comparison is None:
        return []
    rows = {row["condition"]: row for row in comparison["conditions"]}
    return [_pair_sentences(pair, rows, comparison["threshold"]) for pair in comparison["pairs"]] + [
        _gain_sentences(row, comparison["baseline"]) for row in rows.values()
    ]


def _pair_sentences(pair: dict[str, Any], rows: dict[str, Any], threshold: float) -> str:
    first, second, strict, numeric = pair["first"], pair["second"], pair["strict"], pair["numeric"]
    means = [
        f"{name} solves {percent(rows[name]['strict']['mean'])} ({_seeds(rows[name])})"
        for name in (first, second)
    ]
    limit = f"the study's threshold of {100 * threshold:.2f} points"
    rule = f"reaches {limit}."
    if strict["verdict"] == "inconclusive":
        rule = f"is below {limit}: neither is called better."
    parts = [
        f"By the strict score, {means[0]} and {means[1]}.",
        f"The difference of {points(strict['gap'])} points {rule}",
    ]
    if strict["pooled"] and strict["pooled"]["interval"]:
        parts.append(f"Its 95 % interval over problems is {interval(strict['pooled']['interval'])} points.")
    parts.append(
        f"By the numeric score the difference is {points(numeric['gap'])} points ({numeric['verdict']})."
    )
    if numeric["verdict"] != strict["verdict"]:
        parts.append("The two scores do not agree, so the format of the answers is part of this result.")
    if pair["unpaired_seeds"]:
        seeds = ", ".join(map(str, pair["unpaired_seeds"]))
        parts.append(f"Only one of the two was evaluated with seed {seeds}.")
    return " ".join(parts)


def _seeds(row: dict[str, Any]) -> str:
    seeds = row["seeds"]
    return f"seed {seeds[0]} alone" if len(seeds) == 1 else f"mean of seeds {', '.join(map(str, seeds))}"


def _gain_sentences(row: dict[str, Any], baseline: dict[str, Any] | None) -> str:
    name = row["condition"]
    if baseline is None:
        return f"The gain of {name} is not known: the untouched base was not evaluated."
    delta = row["strict"]["delta_to_baseline"]
    text = (
        f"Against the untouched base ({percent(baseline['accuracy'])} strict, "
        f"{percent(baseline['accuracy_numeric'])} numeric), {name} changes the strict score by "
        f"{points(delta)} points and the numeric one by {points(row['numeric']['delta_to_baseline'])}."
    )
    format_share = row["format_share_of_gain"]
    if format_share is not None and format_share >= 1:
        text += " So all of the strict gain is the format of the answer."
    elif format_share is not None and format_share >= 0.005:
        text += f" So {share(format_share)} of the strict gain is the format of the answer."
    return text


# --- How it was run -----------------------------------------------------------------------------------------


def how_it_was_run(study: Study) -> list[tuple[str, str]]:
    """Names and values of everything the runs record; values that differ are listed with their runs."""
    manifests = {run.run_id: flatten(run.manifest) for run in study.runs}
    for manifest in manifests.values():  # that a run was resumed matters only if it changed something
        if manifest.get("resumed_with") == "none":
            del manifest["resumed_with"]
    names = list(dict.fromkeys(name for manifest in manifests.values() for name in manifest))
    hidden = {"run_id", "command"}
    facts = []
    for name in names:
        if name.split(".")[0] in hidden:
            continue
        values = {run_id: manifest.get(name, "not recorded") for run_id, manifest in manifests.items()}
        distinct = list(dict.fromkeys(values.values()))
        if len(distinct) == 1:
            facts.append((name, distinct[0]))
        else:
            facts.append((name, "; ".join(f"{value} ({_names(values, value)})" for value in distinct)))
    return facts


def _names(values: dict[str, str], value: str) -> str:
    return ", ".join(run_id for run_id, other in values.items() if other == value)


def flatten(value: Any, prefix: str = "") -> dict[str, str]:
    """Nested plain values as dotted names and text; long lists are counted, not shown.

    >>> flatten({"device": {"kind": "cpu", "count": 1}})
    {'device.kind': 'cpu', 'device.count': '1'}
    """
    if isinstance(value, dict):
        return {
            name: text
            for key, inner in value.items()
            for name, text in flatten(inner, f"{prefix}.{key}" if prefix else str(key)).items()
        }
    if isinstance(value, list) and (len(value) > _MAX_LIST or any(isinstance(item, dict) for item in value)):
        return {prefix: f"({len(value):,} entries)"}
    if isinstance(value, list):
        texts = ["; ".join(map(str, item)) if isinstance(item, list) else str(item) for item in value]
        return {prefix: ", ".join(texts) or "none"}
    return {prefix: "not set" if value is None else str(value)}


def totals(study: Study, accounting_rows: Sequence[Record]) -> list[tuple[str, str]]:
    """Tokens of all training runs together; "not recorded" if any run lacks the number."""
    return [
        ("training runs", str(len(study.runs))),
        ("train tokens, all runs", _added([row.get("train_tokens") for row in accounting_rows], whole)),
        (
            "validation tokens, all runs",
            _added([row.get("validation_tokens") for row in accounting_rows], whole),
        ),
    ]


def measured(study: Study, throughput_rows: Sequence[Record]) -> list[tuple[str, str]]:
    """Times and costs of the whole study, which vary when it is repeated."""
    hours = [row["hours"] for row in throughput_rows]
    hours += [None] * (len(study.runs) - len(hours))
    decoding = [
        seconds and seconds / 3600
        for seconds in (summary.get("seconds") for summary in study.evaluation_summaries.values())
    ]
    rates = {_dollars_an_hour(run.manifest) for run in study.runs}
    rate = rates.pop() if len(rates) == 1 else None
    cost = "no price was given (--config.price)"
    if rate is not None:
        cost = _added([*hours, *decoding], lambda total: f"{rate * total:,.2f}")
    return [
        ("hours of training steps, all runs", _added(hours, "{:.2f}".format)),
        ("hours of decoding, all evaluations", _added(decoding, "{:.2f}".format)),
        ("cost of these hours, dollars", cost),
    ]


def _dollars_an_hour(manifest: Record) -> float | None:
    """The price of all devices of a run; None if its configuration gives none."""
    price = (manifest.get("config") or {}).get("price")
    device = manifest.get("device")  # a string if another program wrote it
    count = device.get("count") if isinstance(device, dict) else None
    return None if price is None or count is None else price * count


def _added(values: Sequence[Any], show: Callable[[Any], str]) -> str:
    """The sum; "not recorded" if any value is missing."""
    if not values or None in values:
        return "not recorded for every run"
    return show(sum(values))


def evaluation_settings(study: Study) -> list[tuple[str, str]]:
    """How the answers were decoded, from the evaluations' own summaries."""
    names = (
        "dataset",
        "total",
        "system_prompt",
        "first_prompt",
        "max_new_tokens",
        "stop_token_ids",
        "merged",
    )
    facts = []
    for name in names:
        values = {
            run_id: flatten({name: summary.get(name)})[name]
            for run_id, summary in study.evaluation_summaries.items()
        }
        distinct = list(dict.fromkeys(values.values()))
        if distinct and distinct != ["not set"]:
            text = (
                distinct[0]
                if len(distinct) == 1
                else "; ".join(f"{v} ({_names(values, v)})" for v in distinct)
            )
            facts.append((name, text))
    return facts


# --- What it cannot say -------------------------------------------------------------------------------------


def _edges(study: Study) -> list[str]:
    """Chosen rates at an edge of the grid, where no larger or no smaller one was tried."""
    lines = []
    for setting, by_rate in study.by_rate().items():
        lowest = {value: lowest_nll(runs) for value, runs in by_rate.items()}
        if len(lowest) < 2 or not any(value is not None for value in lowest.values()):
            continue
        best = select_learning_rate(lowest)
        for edge, word in ((max(lowest), "larger"), (min(lowest), "smaller")):
            if best == edge:
                lines.append(
                    f"The best rate of {setting}, {rate(best)}, is at the edge: no {word} one was tried."
                )
    return lines


def caveats(study: Study, comparison: dict[str, Any] | None, accounting_rows: Sequence[Record]) -> list[str]:
    """What a reader must not conclude, as far as the records show it."""
    lines = []
    if comparison and comparison["conditions"]:
        most = max(len(row["seeds"]) for row in comparison["conditions"])
        lines.append(
            f"A condition has at most {most} seed{'s' if most > 1 else ''}, and a seed changes the adapter's "
            "initialisation only. Other orders or samples of the training rows were not tried."
        )
        lines.append(
            "The intervals and tests draw problems, not trained adapters: they say how these adapters would "
            "do on other problems like these, not how another training would turn out."
        )
        lines.append(
            "One base model and one benchmark: nothing follows for other models, other tasks or longer "
            "answers. Whether the base had seen the benchmark before is not known."
        )
    sizes = {
        run.setting: row["adapter_parameters"]
        for run, row in zip(study.runs, accounting_rows, strict=True)
        if row.get("adapter_parameters") is not None
    }
    if len(set(sizes.values())) > 1:
        listed = ", ".join(f"{name} {whole(size)}" for name, size in sizes.items())
        lines.append(
            f"The conditions differ in size as well as in place (trainable parameters: {listed}), so this "
            "comparison does not tell the two apart."
        )
    compared = sorted({value for by_rate in study.by_rate().values() for value in by_rate})
    rates = compared if study.trials else []
    if compared and not rates:
        lines.append(f"Learning rates were compared among {', '.join(map(rate, compared))} and no others.")
    elif rates:
        steps = max((max(run.validation_nll(), default=0) for run in study.trials), default=0)
        lines.append(
            f"Learning rates were chosen among {', '.join(map(rate, rates))} on runs of {steps:,} steps; "
            "the best rate of a full run may be another."
        )
    else:
        lines.append("No learning-rate selection is recorded here: the rates may suit one condition better.")
    return lines + _edges(study)
