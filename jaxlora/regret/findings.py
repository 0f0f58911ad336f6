"""The claims of "LoRA Without Regret" about supervised fine-tuning, tested on an experiment's sweeps.

    for finding in findings(sweeps): finding.claim, finding.figure, finding.verdict, finding.against

Each test is a rule that applies to any experiment: what is measured, and which values agree, disagree or
leave it open. A difference counts if it exceeds two standard errors, estimated from the scatter between
repeats; without repeats, nothing that depends on a difference is decided. `against` is what others found.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from jaxlora.regret.arms import WORST_MATCH
from jaxlora.regret.capacity import code_length, flops_ratio, rank_for
from jaxlora.regret.fits import Ratio, departure, line_in_log, ratio, slope
from jaxlora.regret.sweeps import Sweep, find, main_batch, ranks_of, scatter_of

AGREES, DISAGREES, CANNOT = "agrees", "disagrees", "cannot say"
ERRORS = 2.0  # standard errors that a difference must exceed
STRAIGHT = 0.98  # fraction of variance that a line in log step must explain
EARLY = 0.1  # the first tenth of the steps
HIGH_RANK = 64  # ranks from here on count as high


@dataclass(frozen=True)
class Finding:
    """One claim and its verdict."""

    claim: str
    rule: str
    figure: str  # ours, in words and numbers
    verdict: str
    against: str = ""  # evidence from others, for or against


def findings(sweeps: Sequence[Sweep]) -> list[Finding]:
    """Every claim about supervised runs, in the order of the post."""
    scatter = scatter_of(sweeps)
    asked: list[Callable[[Sequence[Sweep], float | None], Finding]] = [
        _same_curve,
        _straight,
        _departures,
        _ten_times,
        _rank_invariant,
        _rank_one_lower,
        _early_curves,
        _batch_gap,
        _batch_rank,
        _small_batches,
        _mlp_over_attention,
        _mlp_is_enough,
        _short_runs,
        _norms,
        _flops,
        _capacity,
    ]
    return [ask(sweeps, scatter) for ask in asked]


def _verdict(difference: float, error: float) -> str:
    """The verdict on a claim that a difference is above zero, given its standard error."""
    if abs(difference) <= ERRORS * error:
        return CANNOT
    return AGREES if difference > 0 else DISAGREES


def _gap(first: Sweep | None, second: Sweep | None, scatter: float | None) -> tuple[float, float] | None:
    """Loss of the first minus the second over common seeds, each at its best rate, and the standard error.

    None if either is missing, or on an edge, where its loss is not that of its best rate.
    """
    if first is None or second is None or scatter is None or first.on_edge or second.on_edge:
        return None
    seeds = sorted(first.by_seed.keys() & second.by_seed.keys())
    if not seeds:
        return None
    mean = sum(first.by_seed[seed] - second.by_seed[seed] for seed in seeds) / len(seeds)
    return mean, scatter * math.sqrt(2 / len(seeds))


def _shown(gap: tuple[float, float]) -> str:
    return f"{gap[0]:+.4f} ± {gap[1]:.4f}"


def _missing(claim: str, rule: str, what: str, against: str = "") -> Finding:
    return Finding(claim, rule, what, CANNOT, against)


# --- Ranks --------------------------------------------------------------------------------------------------


def _high(sweeps: Sequence[Sweep]) -> list[Sweep]:
    return [sweep for sweep in ranks_of(sweeps) if (sweep.rank or 0) >= HIGH_RANK]


def _same_curve(sweeps: Sequence[Sweep], scatter: float | None) -> Finding:
    claim = "At high rank an adapter follows the curve of full fine-tuning"
    rule = (
        f"at its best rate, the last loss of every rank of {HIGH_RANK} or more differs from full"
        f" fine-tuning's by no more than {ERRORS:g} standard errors"
    )
    against = (
        "Biderman et al. (2405.09673): adapters fall behind in runs that resemble pre-training; the post"
        " itself finds a tie with scatter at 1B"
    )
    full = find(sweeps, None)
    gaps = {s.rank: gap for s in _high(sweeps) if (gap := _gap(s, full, scatter)) is not None}
    if not gaps:
        return _missing(claim, rule, "no high rank beside full fine-tuning with repeats", against)
    figure = "LoRA minus full: " + ", ".join(f"r{rank} {_shown(gap)}" for rank, gap in gaps.items())
    same = all(abs(gap) <= ERRORS * error for gap, error in gaps.values())
    return Finding(claim, rule, figure, AGREES if same else DISAGREES, against)


def _straight(sweeps: Sequence[Sweep], scatter: float | None) -> Finding:
    claim = "The loss of full fine-tuning and high ranks falls linearly in the logarithm of the step"
    rule = (
        f"a line in ln(step) through each envelope after its first tenth explains {STRAIGHT:.0%} of the"
        f" variance"
    )
    chosen = [s for s in [find(sweeps, None), *_high(sweeps)] if s is not None]
    lines = {
        s.name: line
        for s in chosen
        if (line := line_in_log(s.envelope, math.ceil(EARLY * s.steps))) is not None
    }
    if not lines:
        return _missing(claim, rule, "no envelope has three points")
    figure = "; ".join(f"{name} {x.a:.3f} {x.b:+.4f} ln t, R² {x.r2:.3f}" for name, x in lines.items())
    straight = all(line.r2 >= STRAIGHT for line in lines.values())
    return Finding(claim, rule, figure, AGREES if straight else DISAGREES)


def departures(sweeps: Sequence[Sweep], scatter: float | None) -> dict[int, int | None]:
    """By rank, the step from which its envelope stays above that of the highest rank; None: never."""
    ranks = ranks_of(sweeps)
    if scatter is None or len(ranks) < 2:
        return {}
    by = ERRORS * math.sqrt(2) * scatter
    top = ranks[-1].envelope
    return {s.rank: departure(s.envelope, top, by) for s in ranks[:-1] if s.rank is not None}


def _departures(sweeps: Sequence[Sweep], scatter: float | None) -> Finding:
    claim = "Lower ranks leave that curve, at a step that grows with the rank"
    rule = (
        f"the step from which an envelope stays more than {ERRORS:g} standard errors of a difference above"
        f" that of the highest rank does not fall with the rank, and at least two ranks leave"
    )
    left = departures(sweeps, scatter)
    if not left:
        return _missing(claim, rule, "no two ranks with repeats")
    figure = ", ".join(f"r{rank} {'never' if step is None else f'at {step}'}" for rank, step in left.items())
    steps = [math.inf if step is None else step for step in left.values()]
    if sum(map(math.isfinite, steps)) < 2:
        return Finding(claim, rule, figure, CANNOT)
    grows = all(a <= b for a, b in pairwise(steps))
    return Finding(claim, rule, figure, AGREES if grows else DISAGREES)


# --- Rates --------------------------------------------------------------------------------------------------


def rate_ratio(
    sweeps: Sequence[Sweep], scatter: float | None, rank: int, step: int | None = None
) -> Ratio | None:
    """The best rate of a rank divided by that of full fine-tuning, at a step."""
    lora, full = find(sweeps, rank), find(sweeps, None)
    if lora is None or full is None:
        return None
    return ratio(lora.best(scatter, step), full.best(scatter, step))


def _ten_times(sweeps: Sequence[Sweep], scatter: float | None) -> Finding:
    claim = "The best rate of an adapter is ten times that of full fine-tuning (9.8 over 14 models)"
    rule = "the 95 % intervals of the ratios of all ranks from 4 on hold 10, or at least half of them do"
    against = (
        "Brokttv (49480e8e): 10 times at r16, then 3 and 1, where alpha grows with the rank; a theory from"
        " rank-invariance alone would give hidden / (2 alpha)"
    )
    found = {
        s.rank: one
        for s in ranks_of(sweeps)
        if s.rank is not None and s.rank >= 4 and (one := rate_ratio(sweeps, scatter, s.rank)) is not None
    }
    known = {rank: one for rank, one in found.items() if one.low is not None}
    if not known:
        return _missing(
            claim, rule, "no ratio with an interval (a best rate on an edge, or no repeats)", against
        )
    figure = ", ".join(f"r{rank} {one}" for rank, one in known.items())
    holds = sum(1 for one in known.values() if (one.low or 0) <= 10 <= (one.high or 0))
    return Finding(claim, rule, figure, AGREES if 2 * holds >= len(known) else DISAGREES, against)


def _rank_invariant(sweeps: Sequence[Sweep], scatter: float | None) -> Finding:
    claim = "The best rate moves by less than 2 between rank 4 and rank 512"
    rule = (
        "the 95 % interval of the ratio of the best rates of the lowest rank from 4 on and the highest lies"
        " within 1/2 to 2; outside it disagrees, across it cannot say"
    )
    against = (
        "the published sweep of tinker-cookbook: from 3e-4 at r4 to 1e-3 at r16 to r64, up to 3 times on"
        " its grid; Chen, Villar and Hayou (2026): invariant or as 1/r, by the scale of the initialisation"
    )
    ranks = [s for s in ranks_of(sweeps) if (s.rank or 0) >= 4]
    if len(ranks) < 2:
        return _missing(claim, rule, "fewer than two ranks from 4 on", against)
    one = ratio(ranks[-1].best(scatter), ranks[0].best(scatter))
    name = f"r{ranks[-1].rank} over r{ranks[0].rank}"
    if one is None or one.low is None or one.high is None:
        return _missing(claim, rule, f"{name}: on an edge, or no repeats", against)
    inside = one.low >= 0.5 and one.high <= 2
    outside = one.high < 0.5 or one.low > 2
    verdict = AGREES if inside else DISAGREES if outside else CANNOT
    return Finding(claim, rule, f"{name}: {one}", verdict, against)


def _rank_one_lower(sweeps: Sequence[Sweep], scatter: float | None) -> Finding:
    claim = "The best rate of rank 1 is lower than that of higher ranks"
    rule = "the 95 % interval of the best rate of rank 1 over that of rank 16 lies below 1"
    first, other = find(sweeps, 1), find(sweeps, 16)
    one = ratio(first.best(scatter), other.best(scatter)) if first and other else None
    if one is None or one.low is None or one.high is None:
        return _missing(claim, rule, "rank 1 or 16 was not run, lies on an edge, or has no repeats")
    verdict = AGREES if one.high < 1 else DISAGREES if one.low > 1 else CANNOT
    return Finding(claim, rule, f"r1 over r16: {one}", verdict)


def _early_curves(sweeps: Sequence[Sweep], scatter: float | None) -> Finding:
    claim = "At one rate the first learning curves of all ranks coincide"
    rule = (
        f"at each rate that r16 and r256 share and no run diverges at, their losses in the first 3 % of the"
        f" steps differ by no more than {ERRORS:g} standard errors of a difference"
    )
    low, high = find(sweeps, 16), find(sweeps, 256)
    if low is None or high is None or scatter is None:
        return _missing(claim, rule, "r16 and r256 were not both run with repeats")
    worst, last = 0.0, 0.0
    until = max(1, round(0.03 * low.steps))
    shared = [rate for rate in low.curves if rate in high.curves]
    for rate in shared:
        a, b = dict(low.curves[rate]), dict(high.curves[rate])
        early = [a[step] - b[step] for step in a if step in b and step <= until]
        worst = max([worst, *map(abs, early)])
        if low.steps in a and low.steps in b:
            last = max(last, abs(a[low.steps] - b[low.steps]))
    if not shared:
        return _missing(claim, rule, "they share no rate")
    bar = ERRORS * math.sqrt(2) * scatter
    figure = (
        f"largest |r16 - r256| to step {until}: {worst:.4f}, at the end {last:.4f}, over {len(shared)}"
        f" rates; bar {bar:.4f}"
    )
    return Finding(claim, rule, figure, AGREES if worst <= bar else DISAGREES)


def _short_runs(sweeps: Sequence[Sweep], scatter: float | None) -> Finding:
    claim = "In short runs (under about 100 steps) the ratio of best rates is higher, about 15 (anecdotal)"
    rule = (
        "at a constant rate a run's first steps are a short run: the ratio at the first step where it can"
        " be read is above that at the end, their intervals apart"
    )
    shown = []
    for rank in (16, 256):
        sweep = find(sweeps, rank)
        if sweep is None:
            continue
        steps = [point.step for point in sweep.envelope]
        found = [
            (step, one) for step in steps if (one := rate_ratio(sweeps, scatter, rank, step)) is not None
        ]
        shown += [(rank, found)] if len(found) > 1 else []
    if not shown:
        return _missing(claim, rule, "no ratio can be read at two steps")
    verdicts = set()
    for _, found in shown:
        (_, early), (_, late) = found[0], found[-1]
        if early.low is None or late.high is None or early.high is None or late.low is None:
            verdicts.add(CANNOT)
        else:
            above, below = early.low > late.high, early.high < late.low
            verdicts.add(AGREES if above else DISAGREES if below else CANNOT)
    figure = "; ".join(
        f"r{rank}: " + ", ".join(f"step {step} {one.value:.1f}" for step, one in found)
        for rank, found in shown
    )
    return Finding(claim, rule, figure, verdicts.pop() if len(verdicts) == 1 else CANNOT)


# --- Batches ------------------------------------------------------------------------------------------------


def batch_gaps(sweeps: Sequence[Sweep], rank: int, scatter: float | None) -> dict[int, tuple[float, float]]:
    """By rows per step, the loss of a rank minus that of full fine-tuning, if neither is on an edge."""
    found = {}
    for rows in sorted({sweep.batch_rows for sweep in sweeps}):
        lora, full = find(sweeps, rank, batch_rows=rows), find(sweeps, None, batch_rows=rows)
        if (gap := _gap(lora, full, scatter)) is not None:
            found[rows] = gap
    return found


def _batch_ranks(sweeps: Sequence[Sweep], scatter: float | None) -> dict[int, dict[int, tuple[float, float]]]:
    other = [s for s in sweeps if s.batch_rows != main_batch(sweeps) and s.rank is not None]
    ranks = sorted({s.rank for s in other if s.rank is not None})
    found = {rank: batch_gaps(sweeps, rank, scatter) for rank in ranks}
    return {rank: gaps for rank, gaps in found.items() if len(gaps) > 1}


def _batch_slope(gaps: dict[int, tuple[float, float]]) -> tuple[float, float]:
    """Growth of the gap per doubling of the batch, and its standard error."""
    rows = [math.log2(size) for size in gaps]
    error = max(error for _, error in gaps.values())
    value, of_slope = slope(rows, [gap for gap, _ in gaps.values()], error)
    return value, of_slope or 0.0


def _batch_gap(sweeps: Sequence[Sweep], scatter: float | None) -> Finding:
    claim = "An adapter's gap to full fine-tuning grows with the batch size"
    rule = (
        f"for each rank, the slope of (LoRA - full) over log2(rows a step), every cell at its own best rate"
        f" and none on an edge, is above zero by {ERRORS:g} standard errors"
    )
    against = '"Structure Over Scale": in RL a high rank collapses at batches of 64 to 256, at one fixed rate'
    by_rank = _batch_ranks(sweeps, scatter)
    if not by_rank:
        return _missing(claim, rule, "fewer than two batch sizes with swept rates", against)
    slopes = {rank: _batch_slope(gaps) for rank, gaps in by_rank.items()}
    figure = "; ".join(
        f"r{rank}: "
        + ", ".join(f"{rows} rows {gap:+.4f}" for rows, (gap, _) in by_rank[rank].items())
        + f", a doubling {_shown(one)}"
        for rank, one in slopes.items()
    )
    verdicts = {_verdict(*one) for one in slopes.values()}
    return Finding(claim, rule, figure, verdicts.pop() if len(verdicts) == 1 else CANNOT, against)


def _batch_rank(sweeps: Sequence[Sweep], scatter: float | None) -> Finding:
    claim = "That growth does not depend on the rank"
    rule = f"the slopes of the lowest and the highest rank differ by no more than {ERRORS:g} standard errors"
    slopes = {rank: _batch_slope(gaps) for rank, gaps in _batch_ranks(sweeps, scatter).items()}
    if len(slopes) < 2:
        return _missing(claim, rule, "fewer than two ranks at several batch sizes")
    (low, first), (high, second) = min(slopes.items()), max(slopes.items())
    difference, error = first[0] - second[0], math.hypot(first[1], second[1])
    same = abs(difference) <= ERRORS * error
    figure = f"a doubling: r{low} {_shown(first)}, r{high} {_shown(second)}"
    return Finding(claim, rule, figure, AGREES if same else DISAGREES)


def _small_batches(sweeps: Sequence[Sweep], scatter: float | None) -> Finding:
    claim = "Both methods do best at small batches"
    rule = "over one epoch, the smaller half of the batch sizes holds the lowest loss of each method"
    sizes = sorted({s.batch_rows for s in sweeps if s.full or s.placement == "all_layer"})
    names = {}
    for rank in (None, *_batch_ranks(sweeps, scatter)):
        finals = {
            size: final.mean
            for size in sizes
            if (own := find(sweeps, rank, batch_rows=size)) and (final := own.final(scatter))
        }
        if len(finals) > 1:
            names["full" if rank is None else f"r{rank}"] = finals
    if not names:
        return _missing(claim, rule, "fewer than two batch sizes")
    figure = "; ".join(
        f"{name}: " + ", ".join(f"{size} rows {loss:.4f}" for size, loss in own.items())
        for name, own in names.items()
    )
    small = [min(own, key=own.__getitem__) in sorted(own)[: (len(own) + 1) // 2] for own in names.values()]
    return Finding(claim, rule, figure, AGREES if all(small) else DISAGREES)


# --- Placements ---------------------------------------------------------------------------------------------


def matched(sweeps: Sequence[Sweep], first: str, second: str) -> list[tuple[Sweep, Sweep]]:
    """Pairs of adapters of two placements with nearly equal parameter counts."""
    rows = main_batch(sweeps)
    own = [s for s in sweeps if s.batch_rows == rows]
    return [
        (a, b)
        for a in own
        if a.placement == first
        for b in own
        if b.placement == second and abs(a.parameters / b.parameters - 1) < WORST_MATCH
    ]


def _mlp_over_attention(sweeps: Sequence[Sweep], scatter: float | None) -> Finding:
    claim = "Attention alone is worse than the MLP alone at equal parameters"
    rule = (
        f"each pair within 5 % of parameters: attention minus MLP is above zero by {ERRORS:g} standard errors"
    )
    against = (
        "waynehacking8 on GSM8K with Llama 3.1 8B: perplexity 2.42 with attention, 2.37 with all (agrees)"
    )
    gaps = [
        (a, m, gap)
        for a, m in matched(sweeps, "attention_only", "mlp_only")
        if (gap := _gap(a, m, scatter)) is not None
    ]
    if not gaps:
        return _missing(claim, rule, "no matched pair with repeats", against)
    figure = "; ".join(f"{a.name} minus {m.name}: {_shown(gap)}" for a, m, gap in gaps)
    verdicts = {_verdict(*gap) for _, _, gap in gaps}
    return Finding(claim, rule, figure, verdicts.pop() if len(verdicts) == 1 else CANNOT, against)


def _mlp_is_enough(sweeps: Sequence[Sweep], scatter: float | None) -> Finding:
    claim = "The MLP alone does about as well as all layers at the same rank"
    rule = f"MLP minus all at each common rank is no more than {ERRORS:g} standard errors from zero"
    gaps = {}
    for sweep in ranks_of(sweeps, "mlp_only"):
        gap = _gap(sweep, find(sweeps, sweep.rank), scatter)
        if gap is not None and sweep.rank is not None:
            gaps[sweep.rank] = gap
    if not gaps:
        return _missing(claim, rule, "no common rank with repeats")
    figure = ", ".join(f"r{rank} {_shown(gap)}" for rank, gap in gaps.items())
    pairs = [(m, a, gap) for m, a in matched(sweeps, "mlp_only", "all_layer") if (gap := _gap(m, a, scatter))]
    if pairs:
        shown = (f"r{mlp.rank} minus all r{both.rank} {_shown(gap)}" for mlp, both, gap in pairs)
        figure += "; at equal parameters " + ", ".join(shown)
    same = all(abs(gap) <= ERRORS * error for gap, error in gaps.values())
    return Finding(claim, rule, figure, AGREES if same else DISAGREES)


# --- Norms, FLOPs, capacity ---------------------------------------------------------------------------------


def _norms(sweeps: Sequence[Sweep], scatter: float | None) -> Finding:
    claim = "At the end the spectral norm of B exceeds that of A"
    rule = (
        "at its best rate, in more than half of a rank's matrices; at all ranks it agrees, at none it"
        " disagrees"
    )
    shares = {}
    for sweep in ranks_of(sweeps):
        record = sweep.best_record
        pairs = [
            (b, a)
            for own in (record or {}).get("norms", {}).values()
            for a, b in zip(own.get("a", []), own.get("b", []), strict=True)
        ]
        if pairs and sweep.rank is not None:
            shares[sweep.rank] = sum(b > a for b, a in pairs) / len(pairs)
    if not shares:
        return _missing(claim, rule, "no norms were recorded")
    figure = "share of matrices: " + ", ".join(f"r{rank} {share:.0%}" for rank, share in shares.items())
    most = [share > 0.5 for share in shares.values()]
    return Finding(claim, rule, figure, AGREES if all(most) else DISAGREES if not any(most) else CANNOT)


def _flops(sweeps: Sequence[Sweep], scatter: float | None) -> Finding:
    claim = "An adapter takes a little over two thirds of the FLOPs of full fine-tuning"
    rule = (
        "the compiler's count of the training steps, at ranks up to 16, is 0.66 to 0.75 of full"
        " fine-tuning's; on GPUs products are library calls, which it does not count: there (2W + 3P) /"
        " (3W) alone is shown"
    )
    full, ranks = find(sweeps, None), [sweep for sweep in ranks_of(sweeps) if sweep.rank]
    if full is None or not ranks:
        return _missing(claim, rule, "full fine-tuning or ranks were not run")
    counted = {s.rank or 0: flops_ratio(full.parameters, s.parameters) for s in ranks}
    figure = "(2W + 3P) / (3W): " + ", ".join(f"r{rank} {share:.2f}" for rank, share in counted.items())
    whole = _step_flops(full)
    seen = {s.rank or 0: own / whole for s in ranks if whole and (own := _step_flops(s))}
    if not seen:
        return Finding(claim, rule, figure, CANNOT)
    figure = "by the compiler: " + ", ".join(f"r{rank} {share:.2f}" for rank, share in seen.items())
    inside = [0.66 <= share <= 0.75 for rank, share in seen.items() if rank <= 16]
    return Finding(claim, rule, figure, CANNOT if not inside else AGREES if all(inside) else DISAGREES)


def _step_flops(sweep: Sweep) -> float | None:
    """The compiler's FLOP count for one training step in the largest buffers; None on GPUs."""
    counts = [max(r["flops"].values()) for r in sweep.records if r.get("flops") and _counts(r["device"])]
    return counts[0] if counts else None


def _counts(device: str) -> bool:
    return device == "cpu" or device.startswith("TPU")


def _capacity(sweeps: Sequence[Sweep], scatter: float | None) -> Finding:
    claim = "An adapter falls behind where the data hold more bits than it can store, about 2 a parameter"
    rule = (
        "ranks whose 2 bits a parameter hold the code length of the first pass follow the highest rank, the"
        " others leave it"
    )
    full = find(sweeps, None)
    record = full.best_record if full else None
    left = departures(sweeps, scatter)
    one = next((s for s in ranks_of(sweeps) if s.rank), None)
    if record is None or not left or one is None or one.rank is None:
        return _missing(claim, rule, "no full fine-tuning, or no departures")
    bits = code_length(record["train"]["nll"], record["steps_per_epoch"])
    tokens = sum(record["train"]["weight"][: record["steps_per_epoch"]])
    enough = rank_for(bits, one.parameters // one.rank)
    figure = (
        f"{bits / 1e6:.2f} Mbit ({bits / tokens:.2f} a token): rank {enough} would hold it; "
        + ", ".join(
            f"r{rank} {'stays' if step is None else f'leaves at {step}'}" for rank, step in left.items()
        )
    )
    holds = all((step is None) == (rank >= enough) for rank, step in left.items())
    return Finding(claim, rule, figure, AGREES if holds else DISAGREES)
