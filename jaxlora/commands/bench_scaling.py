"""Benchmark training and decoding on 1, 2, 4, ... GPUs of one host, with one process per measurement.

    jaxlora bench scaling --model qwen3-8b --steps 16 --out scaling.jsonl
    jaxlora bench scaling --only weak-1,weak-2,fsdp-2

Each measurement is a command `jaxlora bench train ...` or `decode ...`, which is printed, on some of the
GPUs; as many run concurrently as there are GPUs for. The table compares each with one GPU of this host.
Without a GPU, as many CPU devices are simulated as `XLA_FLAGS` says: a rehearsal, not a measurement.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from jaxlora.runtime.errors import MachineError, UserError

WEAK, STRONG = 8, 32  # rows per step: on each GPU, and on all together


@dataclass(frozen=True)
class Case:
    """One measurement."""

    name: str
    n: int  # GPUs
    words: tuple[str, ...]  # arguments of `jaxlora bench`
    against: str  # the measurement on one GPU that it is compared with
    ideal: float  # the ideal ratio of the two rates


def cases(n_devices: int) -> list[Case]:
    """All measurements on 1, 2, 4, ... up to this many GPUs."""
    sizes = [2**i for i in range(n_devices.bit_length()) if 2**i <= n_devices]
    found: list[Case] = []

    def train(name: str, n: int, rows: int, against: str, *words: str, **mesh: int) -> None:
        axes = [f"--config.mesh.{axis}={size}" for axis, size in mesh.items()]
        words = ("train", "--no-validation", "--batch-rows", str(rows), *axes, *words)
        found.append(Case(f"{name}-{n}", n, words, against, n))

    for n in sizes:
        train("weak", n, WEAK * n, "weak-1", data=n, fsdp=1)
        if WEAK * n != STRONG:  # otherwise measured already
            train("strong", n, STRONG, "strong-1", data=n, fsdp=1)
        if n > 1:
            train("fsdp", n, WEAK * n, "weak-1", data=1, fsdp=n)
        if n > 2:
            train("mixed", n, WEAK * n, "weak-1", data=n // 2, fsdp=2)
        words = ("decode", "--repeat", str(n), "--earlier", "0.85")
        found.append(Case(f"decode-{n}", n, words, "decode-1", n))
    if n_devices > 1:
        n = sizes[-1]
        train("full", n, WEAK * n, "", "--config.train.what=full", data=1, fsdp=n)
    return found


def waves(chosen: Sequence[Case], n_devices: int) -> list[list[Case]]:
    """Group the measurements that run concurrently, none with more GPUs than there are."""
    groups: list[list[Case]] = []
    for case in sorted(chosen, key=lambda case: (-case.n, case.words[0])):
        for group in groups:
            if sum(other.n for other in group) + case.n <= n_devices:
                group.append(case)
                break
        else:
            groups.append([case])
    return groups


def run_scaling(options: argparse.Namespace) -> int:
    """Run the measurements and print the table; returns 1 if one failed.

    Raises:
      UserError: a name is unknown, or this machine has no such devices.
    """
    gpus = visible_gpus()
    n_devices = len(gpus) or _simulated()
    chosen = cases(n_devices)
    if options.only:
        names = options.only.split(",")
        if odd := [name for name in names if name not in {case.name for case in chosen}]:
            known = ", ".join(case.name for case in chosen)
            raise UserError(
                f"--only: {odd[0]!r:.80} is not known on {n_devices} devices; choose from {known}"
            )
        chosen = [case for case in chosen if case.name in names]
    results: dict[str, dict[str, Any]] = {}
    failed: list[str] = []
    for group in waves(chosen, n_devices):
        starts = [sum(case.n for case in group[:i]) for i in range(len(group))]
        with ThreadPoolExecutor(len(group)) as pool:
            made = pool.map(
                lambda case, start: measure(case, gpus[start : start + case.n], options), group, starts
            )
            for case, result in zip(group, made, strict=True):
                if isinstance(result, str):
                    print(f"{case.name}: {result}", file=sys.stderr)
                    failed.append(case.name)
                else:
                    results[case.name] = {"measurement": case.name} | result
                    _write(options, results[case.name])
    show([case for case in chosen if case.name in results], results)
    return 1 if failed else 0


def visible_gpus() -> list[str]:
    """The GPUs visible to JAX, as CUDA_VISIBLE_DEVICES names them; empty if there are none."""
    if (named := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [name for name in named.split(",") if name]
    if os.environ.get("JAX_PLATFORMS") == "cpu" or shutil.which("nvidia-smi") is None:
        return []
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True).stdout
    return [str(i) for i, _ in enumerate(re.findall(r"^GPU \d+:", listed, re.M))]


def _simulated() -> int:
    found = re.search(r"--xla_force_host_platform_device_count=(\d+)", os.environ.get("XLA_FLAGS", ""))
    if found is None:
        raise UserError(
            "scaling: this machine has no GPU; rehearse with"
            " XLA_FLAGS=--xla_force_host_platform_device_count=4"
        )
    return int(found[1])


def measure(case: Case, gpus: list[str], options: argparse.Namespace) -> dict[str, Any] | str:
    """The result of one measurement, or the last line of its error."""
    command = [sys.executable, "-m", "jaxlora", "bench", *case.words, *_shared(case, options)]
    environment = dict(os.environ)
    if gpus:
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)
    else:
        environment["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={case.n}"
    print(f"{case.name}: jaxlora {' '.join(command[3:])}", file=sys.stderr)
    start = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        return (done.stderr.strip().splitlines() or ["no reason given"])[-1]
    result = json.loads(done.stdout.splitlines()[-1])
    return result | {"command": command[3:], "wall_seconds": time.monotonic() - start}


def _shared(case: Case, options: argparse.Namespace) -> Iterator[str]:
    """The options of `bench scaling` that are passed to the measurement."""
    names = ["model", "condition", "rank", "attention", "dtype", "num_layers"]
    names += ["steps", "buffer_sizes"] if case.words[0] == "train" else ["slots", "prompts"]
    for name in names:
        if (value := getattr(options, name)) is not None:
            yield from (f"--{name.replace('_', '-')}", str(value))


def _write(options: argparse.Namespace, result: dict[str, Any]) -> None:
    """Write the line of JSON to standard output and, immediately, to the file: the run may be cut off."""
    print(json.dumps(result), flush=True)
    if options.out is not None:
        with options.out.open("a") as file:
            file.write(json.dumps(result) + "\n")


def rate_of(result: dict[str, Any]) -> float:
    """Real tokens per second, trained or generated."""
    return result.get("real_tokens_per_second") or result["generated_tokens_per_second"]


def show(chosen: Sequence[Case], results: dict[str, dict[str, Any]]) -> None:
    """Print the measurements side by side."""
    if not chosen:
        raise MachineError("scaling: no measurement succeeded")
    from rich.table import Table

    from jaxlora.runtime.progress import console

    table = Table(title="tokens/s are real ones, of all GPUs together", title_justify="left")
    for name in ("", "GPUs", "mesh", "tokens/s", "of one", "efficiency", "padding", "GiB a GPU"):
        table.add_column(name, justify="right" if name else "left")
    for case in chosen:
        result, one = results[case.name], results.get(case.against)
        times = rate_of(result) / rate_of(one) if one else None
        padding = result.get("padding_efficiency")
        memory = result["peak_memory_gib"]
        table.add_row(
            case.name,
            str(case.n),
            result["mesh"].removesuffix(", tensor=1"),
            f"{rate_of(result):,.0f}",
            f"{times:.2f}" if times else "",
            f"{times / case.ideal:.0%}" if times else "",
            f"{1 - padding:.1%}" if padding else "",
            f"{memory:.1f}" if memory else "",
        )
    console.print(table)
