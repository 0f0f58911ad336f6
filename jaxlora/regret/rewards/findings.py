"""The claims of "LoRA Without Regret" about learning from rewards, tested on an experiment's runs.

    for finding in findings(sweeps): finding.claim, finding.figure, finding.verdict

Sweeps are those of `jaxlora.regret.sweeps`; their loss is here the share of held-out problems answered
wrongly at temperature 0. An arm's accuracy is taken at the rate that was best with the first seed, as a mean
over the other seeds; errors come from the scatter between those, pooled over arms.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from jaxlora.regret.capacity import BITS_PER_PARAMETER
from jaxlora.regret.findings import AGREES, CANNOT, DISAGREES, ERRORS, Finding, rate_ratio
from jaxlora.regret.sweeps import Sweep, find, ranks_of, scatter_of
from jaxlora.runtime.files import Record

KEPT_GAIN = 0.8  # rates that keep at least this share of an arm's best gain in accuracy are its plateau
SURE = 0.05  # accuracy: a tie is declared only if a difference this large would have been detected
CURVE_ERRORS = 3.0  # standard errors, when many looks are compared at once
VAGUE = 5.0  # a ratio's interval that spans more than this factor says nothing
ENDS = 3  # batches at the start and at the end, for bits learned


def findings(sweeps: Sequence[Sweep]) -> list[Finding]:
    """Every claim about runs that learn from rewards."""
    scatter = scatter_of(sweeps)
    return [
        _same_peak(sweeps, scatter),
        _wider(sweeps),
        _one_curve(sweeps, scatter),
        _ten_times(sweeps, scatter),
        _room(sweeps, scatter),
    ]


# --- Numbers ------------------------------------------------------------------------------------------------


def accuracies(sweep: Sweep) -> dict[float, float]:
    """Final held-out accuracy by rate, with the first seed; 0 for runs that diverged."""
    return {rate: 1 - loss if math.isfinite(loss) else 0.0 for rate, loss in sorted(sweep.losses().items())}


def start_of(sweeps: Sequence[Sweep]) -> float:
    """Held-out accuracy before the first step. It is a mean over runs, since programs differ between arms."""
    return float(np.mean([1 - record["held_out"][0][1] for sweep in sweeps for record in sweep.records]))


def mean_curve(sweep: Sweep) -> dict[int, float]:
    """Held-out accuracy at each look, averaged over the seeds at the best rate."""
    curves = [{step: 1 - wrong for step, wrong, _ in record["held_out"]} for record in sweep.at_best]
    if not curves:
        return {}
    steps = sorted(set.intersection(*map(set, curves)))
    return {step: float(np.mean([curve[step] for curve in curves])) for step in steps}


@dataclass(frozen=True)
class Plateau:
    """The rates at which an arm keeps most of its best gain; beyond an open end there may be more."""

    low: float
    high: float
    open_low: bool
    open_high: bool

    @property
    def factor(self) -> float:
        return self.high / self.low

    @property
    def is_open(self) -> bool:
        return self.open_low or self.open_high

    def __str__(self) -> str:
        return f"{'at least ' if self.is_open else ''}{self.factor:.3g} times"


def plateau(by_rate: dict[float, float], start: float, kept: float = KEPT_GAIN) -> Plateau | None:
    """The rates around the best one that keep the share `kept` of its gain; None if nothing was gained.

    The ends are interpolated in log rate.
    """
    rates = sorted(by_rate)
    gains = np.array([by_rate[rate] - start for rate in rates])
    best = int(np.argmax(gains))
    if gains[best] <= 0:
        return None
    bar, logs = kept * gains[best], np.log(rates)
    low, open_low = _crossing(logs[best::-1], gains[best::-1], bar)
    high, open_high = _crossing(logs[best:], gains[best:], bar)
    return Plateau(float(np.exp(low)), float(np.exp(high)), open_low, open_high)


def _crossing(logs: np.ndarray, gains: np.ndarray, bar: float) -> tuple[float, bool]:
    """Where gains first fall below the bar on the way out; if they never do, the last rate and True."""
    for i in range(1, len(logs)):
        if gains[i] < bar:
            share = (gains[i - 1] - bar) / (gains[i - 1] - gains[i])
            return float(logs[i - 1] + share * (logs[i] - logs[i - 1])), False
    return float(logs[-1]), True


def bits_available(record: Record) -> float:
    """The most that the rewards of a run could teach: the sum of each group's entropy."""
    return float(sum(x for x in record["train"]["bits"] if x is not None))


def bits_learned(record: Record) -> float:
    """How many bits shorter the right answers to all training problems are to encode at the end of the run.

    Per problem, this is the rise of the mean log2 of the share of right answers in a group, from the first
    batches to the last.
    """
    own = record["train"]["right_bits"]
    n = max(1, min(ENDS, len(own) // 2))
    return float((np.mean(own[-n:]) - np.mean(own[:n])) * record["problems"])


# --- Claims -------------------------------------------------------------------------------------------------


def _gaps(sweeps: Sequence[Sweep], scatter: float | None) -> dict[int, tuple[float, float]]:
    """Final accuracy of each rank minus that of full fine-tuning, and its standard error."""
    full = find(sweeps, None)
    theirs = None if full is None else full.final(scatter)
    found = {}
    for sweep in ranks_of(sweeps):
        ours = sweep.final(scatter)
        if ours and theirs and ours.error is not None and theirs.error is not None and sweep.rank:
            found[sweep.rank] = theirs.mean - ours.mean, math.hypot(ours.error, theirs.error)
    return found


def _tie(gap: float, error: float) -> str:
    """Whether an adapter reaches full fine-tuning."""
    if gap < -ERRORS * error:
        return DISAGREES
    return AGREES if ERRORS * error <= SURE or gap > ERRORS * error else CANNOT


def _same_peak(sweeps: Sequence[Sweep], scatter: float | None) -> Finding:
    claim = "Rank 1 reaches the accuracy of full fine-tuning"
    rule = (
        f"at its best rate, the last accuracy of rank 1 is not below that of full fine-tuning by more than"
        f" {ERRORS:g} standard errors, and those are at most {SURE:.0%}"
    )
    gaps = _gaps(sweeps, scatter)
    if 1 not in gaps:
        return Finding(claim, rule, "no rank 1 beside full fine-tuning with repeats", CANNOT)
    figure = "rank minus full: " + ", ".join(f"r{r} {gap:+.3f} ± {e:.3f}" for r, (gap, e) in gaps.items())
    return Finding(claim, rule, figure, _tie(*gaps[1]))


def _wider(sweeps: Sequence[Sweep]) -> Finding:
    claim = "Adapters have a wider range of good rates than full fine-tuning"
    rule = (
        f"the range of rates that keep {KEPT_GAIN:.0%} of an arm's best gain, ends interpolated in log rate,"
        " is wider than that of full fine-tuning by more than half a step of the grid, for more than half of"
        " the ranks; a range with an open end is at least so wide"
    )
    start, full = start_of(sweeps), find(sweeps, None)
    theirs = None if full is None else plateau(accuracies(full), start)
    ours = {s.rank: p for s in ranks_of(sweeps) if (p := plateau(accuracies(s), start)) is not None}
    if theirs is None or not ours:
        return Finding(claim, rule, "no gains of adapters beside those of full fine-tuning", CANNOT)
    figure = f"full {theirs}, " + ", ".join(f"r{rank} {one}" for rank, one in ours.items())
    step = math.sqrt(_grid_factor(sweeps))
    votes = [_is_wider(one, theirs, step) for one in ours.values()]
    verdict = CANNOT
    for answer, name in ((True, AGREES), (False, DISAGREES)):
        if votes.count(answer) > len(votes) / 2:
            verdict = name
    return Finding(claim, rule, figure, verdict)


def _grid_factor(sweeps: Sequence[Sweep]) -> float:
    return float(sweeps[0].records[0]["identity"]["factor"])


def _is_wider(one: Plateau, other: Plateau, by: float) -> bool | None:
    """Whether one plateau is wider; None if open ends or the grid's resolution leave that undecided."""
    if not other.is_open and one.factor > by * other.factor:
        return True
    return False if not one.is_open and other.factor * by > one.factor else None


def _one_curve(sweeps: Sequence[Sweep], scatter: float | None) -> Finding:
    claim = "At their best rates all ranks and full fine-tuning follow one curve"
    rule = (
        f"mean accuracies of each rank and of full fine-tuning differ by at most {CURVE_ERRORS:g} standard"
        f" errors at every look, and those are at most {SURE:.0%}"
    )
    full = find(sweeps, None)
    if full is None or scatter is None or not ranks_of(sweeps):
        return Finding(claim, rule, "no ranks beside full fine-tuning with repeats", CANNOT)
    theirs, found = mean_curve(full), {}
    for sweep in ranks_of(sweeps):
        ours = mean_curve(sweep)
        error = scatter * math.sqrt(1 / max(1, len(sweep.at_best)) + 1 / max(1, len(full.at_best)))
        if gaps := {step: ours[step] - theirs[step] for step in ours if step in theirs}:
            step = max(gaps, key=lambda step: abs(gaps[step]))
            found[sweep.rank] = gaps[step], step, error
    if not found:
        return Finding(claim, rule, "no common looks", CANNOT)
    figure = "largest gap: " + ", ".join(
        f"r{rank} {gap:+.3f} ± {error:.3f} at step {step}" for rank, (gap, step, error) in found.items()
    )
    verdict = AGREES if all(CURVE_ERRORS * error <= SURE for _, _, error in found.values()) else CANNOT
    if any(abs(gap) > CURVE_ERRORS * error for gap, _, error in found.values()):
        verdict = DISAGREES
    return Finding(claim, rule, figure, verdict)


def _ten_times(sweeps: Sequence[Sweep], scatter: float | None) -> Finding:
    claim = "The best rate of an adapter is ten times that of full fine-tuning, by reward as well"
    rule = (
        "parabolas through the best rate and its neighbours: the 95 % intervals of the ratios of all ranks"
        f" from 4 on hold 10, or at least half of them do; one whose ends are more than {VAGUE:g} times apart"
        " counts for neither"
    )
    found = {
        s.rank: one
        for s in ranks_of(sweeps)
        if s.rank and s.rank >= 4 and (one := rate_ratio(sweeps, scatter, s.rank)) is not None
    }
    bounded = [(one.low, one.high) for one in found.values() if one.low and one.high]
    if not bounded:
        return Finding(claim, rule, "no ratio with an interval (an edge, or no repeats)", CANNOT)
    figure = ", ".join(f"r{rank} {one}" for rank, one in found.items())
    known = [low <= 10 <= high for low, high in bounded if high <= VAGUE * low]
    if not known:
        return Finding(claim, rule, figure, CANNOT)
    return Finding(claim, rule, figure, AGREES if sum(known) >= len(known) / 2 else DISAGREES)


def _room(sweeps: Sequence[Sweep], scatter: float | None) -> Finding:
    claim = "Rewards teach so few bits that the smallest adapter has room for all of them"
    rule = (
        f"at {BITS_PER_PARAMETER:g} bits a parameter rank 1 holds what the rewards of its run could teach at"
        " most; it agrees where rank 1 also reaches full fine-tuning, disagrees where it falls behind though"
        " it has room"
    )
    one, gaps = find(sweeps, 1), _gaps(sweeps, scatter)
    if one is None or not (runs := one.at_best):
        return Finding(claim, rule, "no run of rank 1", CANNOT)
    available = float(np.mean([bits_available(record) for record in runs]))
    learned = float(np.mean([bits_learned(record) for record in runs]))
    room = BITS_PER_PARAMETER * one.parameters
    figure = (
        f"rank 1: room for {room / 1e3:,.0f} kbit, at most {available / 1e3:,.1f} kbit available,"
        f" {learned / 1e3:,.1f} kbit learned"
    )
    verdict = CANNOT if room < available or 1 not in gaps else _tie(*gaps[1])
    return Finding(claim, rule, figure, verdict)
