"""The plan of a run on a slice: whether it fits, how long it is likely to take, and what that costs.

plan = make_plan(config, model, slice_named("v5e-8"), Workload())
plan.fits, plan.run.hours, print_plan(plan)
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from jaxlora.config import Remat, RunConfig
from jaxlora.estimate import FULL, Choice, candidates
from jaxlora.models.quantised import pick_scheme
from jaxlora.models.spec import ModelConfig
from jaxlora.plan.programs import Program, Programs, Workload
from jaxlora.runtime.devices import SLICES, Chip, Slice
from jaxlora.runtime.progress import progress_bar
from jaxlora.train.schedule import plan_run

GIB = 2**30
RESERVED = 0.02  # share of a chip's memory that is unavailable to programs
SWEEP_RUNS = 6  # runs in a study


@dataclass(frozen=True)
class RunCost:
    """A whole run at the likely rates of `jaxlora.estimate.Roofline`."""

    hours: float
    dollars: float | None


@dataclass(frozen=True)
class Plan:
    """A configuration on a slice: its compiled programs, and what follows from them."""

    slice: Slice
    mesh: dict[str, int]
    remat: Remat
    condition: str
    programs: list[Program]
    fits: bool
    tokens_per_second: float | None  # likely
    best_tokens_per_second: float | None  # a bound
    run: RunCost | None
    sweep: RunCost | None
    advice: str | None
    longest_buffer: int | None  # tokens in the longest buffer that should fit; None: any allowed length

    def to_json(self) -> dict[str, Any]:
        """Plain values: bytes, FLOPs and seconds of one run of each program on one chip."""
        values = asdict(self)
        values["slice"] = self.slice.to_json()
        values["capacity_bytes"] = self.slice.chip.hbm_bytes
        values["programs"] = [program.to_json() for program in self.programs]
        return values


def make_plan(
    config: RunConfig,
    model: ModelConfig,
    slice_: Slice,
    workload: Workload,
    dollars: float | None = None,
    train: Program | None = None,
) -> Plan:
    """Compile the run's four programs for the slice, and work out its time and cost.

    Args:
      dollars: the price per chip-hour.
      train: the training step, if already compiled.
    """
    programs = Programs(config, model, slice_, workload)
    makers = [programs.validation_step, programs.prefill, programs.decode_step]
    done = [] if train is None else [train]
    if train is None:
        makers.insert(0, programs.train_step)
    with progress_bar(f"compiling for {slice_.name}", len(makers), "programs") as advance:
        for make in makers:
            done.append(make())
            advance(1)
    room = slice_.chip.hbm_bytes * (1 - RESERVED)
    fits = all_fit(done, slice_)
    train, validation = done[:2]
    run = sweep = longest = None
    if fits:
        longest = longest_buffer(train, room, programs.multiple, config.train.max_buffer_tokens)
        steps = plan_run(config.optim, config.train, workload.train_rows)
        batches = math.ceil(workload.validation_rows / config.train.validation_batch_rows)
        batches *= len(steps.validation_steps)
        seconds = train.best.likely, steps.total_steps, validation.best.likely, batches
        run = run_cost(*seconds, slice_.n_chips, dollars)
        sweep = RunCost(SWEEP_RUNS * run.hours, None if run.dollars is None else SWEEP_RUNS * run.dollars)
    tokens = config.train.batch_rows * workload.row_tokens
    return Plan(
        slice=slice_,
        mesh=dict(programs.mesh.shape),
        remat=config.model.remat,
        condition=config.lora.condition,
        programs=done,
        fits=fits,
        tokens_per_second=tokens / train.best.likely if fits else None,
        best_tokens_per_second=tokens / train.best.seconds if fits else None,
        run=run,
        sweep=sweep,
        advice=None if fits else what_would_fit(config, model, slice_, workload),
        longest_buffer=longest,
    )


def all_fit(programs: list[Program], slice_: Slice) -> bool:
    """Whether every program fits on a chip."""
    room = slice_.chip.hbm_bytes * (1 - RESERVED)
    return all(p.memory.missing == 0 and p.memory.total <= room for p in programs)


def run_cost(
    train_seconds: float,
    steps: int,
    validation_seconds: float,
    validation_batches: int,
    n_chips: int,
    dollars_per_chip_hour: float | None,
) -> RunCost:
    """Hours for `steps` optimizer steps and `validation_batches` validation batches, and their price."""
    seconds = steps * train_seconds + validation_batches * validation_seconds
    return cost_of(seconds, n_chips, dollars_per_chip_hour)


def cost_of(seconds: float, n_chips: int, dollars_per_chip_hour: float | None) -> RunCost:
    """Hours of a slice, and their price."""
    hours = seconds / 3600
    return RunCost(hours, None if dollars_per_chip_hour is None else hours * n_chips * dollars_per_chip_hour)


def longest_buffer(train: Program, room: float, multiple: int, most: int) -> int | None:
    """Tokens in the longest training buffer that should fit; None if the longest allowed one does.

    Steps vary around the typical one that was compiled. Temporaries are assumed to grow in proportion to the
    number of tokens.

    Args:
      room: bytes on a chip that programs may use.
      multiple: buffer lengths are multiples of this.
      most: tokens in the longest buffer that the configuration allows.
    """
    memory = train.memory
    if not memory.temporaries:
        return None
    fitting = train.tokens * (room - memory.total + memory.temporaries) / memory.temporaries
    longest = max(train.tokens, int(fitting) // multiple * multiple)
    return longest if longest < most else None


def what_would_fit(config: RunConfig, model: ModelConfig, slice_: Slice, workload: Workload) -> str:
    """The fastest choice that should fit on this slice, or on the next larger one of its kind."""
    larger = [s for s in SLICES.values() if s.chip == slice_.chip and s.n_chips > slice_.n_chips]
    for place in [slice_, *sorted(larger, key=lambda s: s.n_chips)]:
        for choice in ranked(config, model, place, workload):
            if choice.memory < FULL * place.chip.hbm_bytes:
                where = "" if place is slice_ else f"on {place.name}, "
                memory = f"{choice.memory / GIB:.1f} GiB per chip, estimated"
                return f"{where}{overrides(choice)} should fit ({memory})"
    return f"no {slice_.chip.name} slice in the table is large enough"


def ranked(config: RunConfig, model: ModelConfig, slice_: Slice, workload: Workload) -> list[Choice]:
    """All choices for this configuration's optimizer step, fastest first."""
    train = config.train
    tokens = train.batch_rows * workload.row_tokens
    scheme = pick_scheme(config.model, slice_.chip, training=True)
    return candidates(model, config.lora, slice_, tokens, train.buffer_multiple, train.what, scheme)


def overrides(choice: Choice) -> str:
    """The command-line overrides that select this choice."""
    mesh = choice.mesh
    names = ("data", "fsdp", "tensor", *(("expert",) if mesh.expert else ()))
    words = [f"--config.mesh.{name}={getattr(mesh, name)}" for name in names]
    words.append(f"--config.model.remat={str(choice.remat).lower()}")
    if choice.buffers > 1:
        words.append(f"--config.train.max_buffer_tokens={choice.tokens}")
    return " ".join(words)


def apply(config: RunConfig, choice: Choice) -> RunConfig:
    """The configuration with this choice applied."""
    train = config.train if choice.buffers == 1 else replace(config.train, max_buffer_tokens=choice.tokens)
    return replace(config, mesh=choice.mesh, model=replace(config.model, remat=choice.remat), train=train)


def search(
    config: RunConfig, model: ModelConfig, slice_: Slice, workload: Workload, console: Console
) -> tuple[RunConfig, Program | None]:
    """Compile training steps, starting with the choice estimated to be fastest, until one fits.

    Returns:
      the configuration with that choice and its training step; if none fits, the original configuration and
      None.
    """
    choices = ranked(config, model, slice_, workload)
    table = Table(
        "mesh data, fsdp, tensor", "remat", "buffers", "GiB / chip", "ms / step", "bound", title="estimates"
    )
    for choice in choices[:8]:
        shape = f"{choice.mesh.data}, {choice.mesh.fsdp}, {choice.mesh.tensor}"
        shape += f"; {choice.mesh.expert} of experts" if choice.mesh.expert else ""
        sizes = f"{choice.buffers} x {choice.tokens}"
        memory, time = f"{choice.memory / GIB:.1f}", f"{choice.best.seconds * 1e3:.0f}"
        table.add_row(shape, str(choice.remat).lower(), sizes, memory, time, choice.best.bound)
    console.print(table)
    room = slice_.chip.hbm_bytes * (1 - RESERVED)
    tries = [c for c in choices if c.memory < 1.2 * slice_.chip.hbm_bytes][:6]
    with progress_bar("compiling training steps, fastest first", len(tries), "choices") as advance:
        for choice in tries:
            step = Programs(apply(config, choice), model, slice_, workload).train_step()
            advance(1)
            verdict = "fits" if step.memory.missing == 0 and step.memory.total <= room else "does not fit"
            console.print(f"{overrides(choice)}: {verdict}", soft_wrap=True)
            if verdict == "fits":
                return apply(config, choice), step
    return config, None


def print_plan(plan: Plan, console: Console) -> None:
    """Print a table of the programs, as each runs on one chip, then a line about the run."""
    title = f"{plan.slice.name}: {plan.slice.n_chips} chips, mesh {plan.mesh}, {plan.condition}"
    title += f", remat {str(plan.remat).lower()}" if plan.remat else ""
    console.print(programs_table(plan.programs, plan.slice.chip, title))
    console.print(summary_line(plan), soft_wrap=True)


def programs_table(programs: list[Program], chip: Chip, title: str) -> Table:
    """What each program needs on one chip in one run."""
    table = Table(title=title, title_justify="left")
    table.add_column("one run on one chip")
    for program in programs:
        table.add_column(program.name, justify="right")

    def row(name: str, cell) -> None:
        table.add_row(name, *(cell(p) for p in programs))

    row("tokens in a buffer or call", lambda p: f"{p.tokens:,}")
    row("arguments, GiB", lambda p: f"{p.memory.arguments / GIB:.2f}")
    row("held by others, GiB", lambda p: f"{p.memory.held / GIB:.2f}")
    row("temporaries, GiB", lambda p: f"{p.memory.temporaries / GIB:.2f}")
    row("peak, GiB", lambda p: f"{p.memory.total / GIB:.2f}" if not p.memory.missing else "does not fit")
    row(f"of {chip.hbm_bytes / GIB:.0f} GiB", _share(chip.hbm_bytes))
    row("TFLOP", lambda p: f"{p.flops / 1e12:.2f}")
    row("HBM, GB", lambda p: f"{p.work.hbm_bytes / 1e9:.1f}")
    for kind in sorted({kind for p in programs for kind in p.work.ici}):
        row(f"{kind}, GB", lambda p, kind=kind: f"{p.work.ici.get(kind, 0) / 1e9:.2f}")
    row("attention kernels", lambda p: str(sum(p.work.kernels.values())))
    row("compute, ms", lambda p: f"{p.best.compute * 1e3:.1f}")
    row("memory, ms", lambda p: f"{p.best.memory * 1e3:.1f}")
    row("interconnect, ms", lambda p: f"{p.best.interconnect * 1e3:.1f}")
    row("at best, ms", lambda p: f"{p.best.seconds * 1e3:.1f}")
    row("likely, ms", lambda p: f"{p.best.likely * 1e3:.1f}")
    row("bound by", lambda p: p.best.bound if p.best.seconds else "")
    row("compiled in, s", lambda p: f"{p.compile_seconds:.0f}")
    return table


def _share(capacity: float):
    def cell(program: Program) -> str:
        used = program.memory.total + program.memory.missing
        return (
            f"+{program.memory.missing / GIB:.2f} GiB" if program.memory.missing else f"{used / capacity:.0%}"
        )

    return cell


def summary_line(plan: Plan) -> str:
    """One line: whether it fits, and likely speed, hours and dollars."""
    if not plan.fits:
        return f"{plan.slice.name}: does not fit; {plan.advice}"
    assert plan.run is not None
    assert plan.sweep is not None
    text = f"{plan.slice.name}: fits; likely {plan.tokens_per_second:,.0f} tokens/s"
    text += f" (at best {plan.best_tokens_per_second:,.0f}),"
    text += f" {plan.run.hours:.2f} h per run, {plan.sweep.hours:.2f} h for {SWEEP_RUNS} runs"
    if plan.run.dollars is not None:
        text += f", ${plan.run.dollars:,.2f} and ${plan.sweep.dollars:,.2f}"
    if plan.longest_buffer is not None:
        text += (
            f". Steps of more than about {plan.longest_buffer:,} tokens do not fit in one buffer:"
            f" --config.train.max_buffer_tokens={plan.longest_buffer} splits them"
        )
    return text


def print_comparison(plans: list[Plan], console: Console) -> None:
    """One row per slice."""
    priced = any(plan.sweep is not None and plan.sweep.dollars is not None for plan in plans)
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))  # 80 columns
    for name in ("slice", "mesh data,\nfsdp,\ntensor", "peak GiB", "step\nms", "bound", "tokens/s"):
        table.add_column(name, justify="left" if name in ("slice", "bound") else "right")
    for name in ("h per\nrun", "h per\nsweep", "$ per\nsweep")[: 3 if priced else 2]:
        table.add_column(name, justify="right")
    for plan in plans:
        train = plan.programs[0]
        mesh = ", ".join(str(plan.mesh[name]) for name in ("data", "fsdp", "tensor"))
        mesh += f"; {plan.mesh['expert']} of experts" if "expert" in plan.mesh else ""
        peak = max(p.memory.total + p.memory.missing for p in plan.programs)
        cells = [plan.slice.name, mesh, f"{peak / GIB:.1f} of {plan.slice.chip.hbm_bytes / GIB:.0f}"]
        if plan.run is None or plan.sweep is None:
            cells += ["", "does not fit"]
        else:
            price = [] if plan.sweep.dollars is None else [f"{plan.sweep.dollars:,.0f}"]
            cells += [f"{train.best.likely * 1e3:.0f}", train.best.bound, f"{plan.tokens_per_second:,.0f}"]
            cells += [f"{plan.run.hours:.2f}", f"{plan.sweep.hours:.2f}", *price]
        table.add_row(*cells)
    console.print(table)
    for plan in plans:
        if plan.advice:
            console.print(summary_line(plan), soft_wrap=True)
