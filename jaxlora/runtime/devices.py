"""The machine: JAX settings, accelerators and their published figures, compiler options, memory.

setup(config.results_dir, config.model.dtype)   # once, before the first array
peak_flops(jax.devices()[0])                    # 989e12 on an H100
slice_named("v5e-8").chip.hbm_bytes             # 16 GiB
"""

from __future__ import annotations

import contextlib
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import jax

from jaxlora.runtime import hosts
from jaxlora.runtime.errors import MachineError, UserError
from jaxlora.runtime.progress import console

NCCL_POLICY, ZERO_CTAS = "NCCL_CTA_POLICY", "2"

# --- Settings -----------------------------------------------------------------------------------------------


def cache_folder(results_dir: str) -> Path:
    """The folder of compiled programs: $JAX_COMPILATION_CACHE_DIR, or ~/.cache/jaxlora/compiled.

    With several hosts only the first writes them, so all use a shared folder: `.compiled` in the results
    directory.
    """
    if named := os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        return Path(named)
    if hosts.n_processes() > 1:
        return Path(results_dir).resolve() / ".compiled"
    return Path.home() / ".cache" / "jaxlora" / "compiled"


def setup(results_dir: str, dtype: str) -> None:
    """Set up what must precede the first array: memory, hosts, compilation cache, float32 precision.

    Args:
      results_dir: where runs are written; see `cache_folder`.
      dtype: the model's dtype, `bfloat16` or `float32`.
    """
    # By default JAX leaves a quarter of a GPU's memory unused, but decoding can use all of it.
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.92")
    os.environ.setdefault(NCCL_POLICY, ZERO_CTAS)  # see `gathers_mapped_memory`
    hosts.start()
    console.quiet = not hosts.is_first()
    jax.config.update("jax_compilation_cache_dir", str(cache_folder(results_dir)))
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)
    if dtype == "float32":  # GPUs and TPUs would multiply float32 at lower precision
        jax.config.update("jax_default_matmul_precision", "highest")


def devices_here() -> list[jax.Device]:
    """All devices; warns once if a CPU is used instead of a GPU.

    Raises:
      MachineError: JAX finds none, such as with JAX_PLATFORMS=cuda on a machine without a GPU.
    """
    try:
        devices = jax.devices()
    except (RuntimeError, AssertionError) as error:
        names = ("JAX_PLATFORMS", "CUDA_VISIBLE_DEVICES")
        given = ", ".join(f"{name}={os.environ[name]}" for name in names if name in os.environ)
        reason = str(error) or "this platform is not available, or its plugin is not installed"
        raise MachineError(f"JAX finds no device ({given or 'nothing is set'}): {reason}") from None
    _warn_of_cpu(devices[0].platform)
    return devices


@cache
def _warn_of_cpu(platform: str) -> None:
    """Warn once if JAX uses the CPU although a GPU was to be expected."""
    has_card = any(Path("/dev").glob("nvidia[0-9]*"))
    if warning := cpu_warning(platform, getattr(jax.config, "jax_platforms", None), os.environ, has_card):
        console.print(warning, style="yellow", markup=False, soft_wrap=True)


def cpu_warning(
    platform: str, asked: str | None, environment: Mapping[str, str], has_card: bool
) -> str | None:
    """The warning for running on a CPU, or None.

    Args:
      asked: the value of JAX_PLATFORMS.
      has_card: whether this machine has an NVIDIA card.
    """
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    if platform != "cpu" or (asked or "").startswith("cpu") or (visible is None and not has_card):
        return None
    if visible is not None:
        reason = f"CUDA_VISIBLE_DEVICES={visible:.80} names no GPU that JAX can use"
    else:
        reason = "JAX cannot use the NVIDIA card that is here"
    return (
        f"the CPU is used: {reason}. Correct that, or see that jaxlora[cuda] is installed; JAX_PLATFORMS=cpu"
        " says that the CPU is meant"
    )


# --- TPU chips and slices -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Chip:
    """One TPU chip as JAX sees it (v4 and v5p: both cores as one device)."""

    name: str
    hbm_bytes: float  # the compiler lets a program use slightly less
    flops: float  # dense bfloat16, FLOP/s
    hbm_rate: float  # bytes/s
    link_rate: float  # bytes/s received over one link of the interconnect
    int8_flops: float  # dense int8, operations/s
    platform: ClassVar[str] = "tpu"

    @property
    def device_kind(self) -> str:
        """The kind as reported by JAX."""
        return next(kind for kind, name in _KINDS.items() if name == self.name)


# From the "System architecture" pages of the Cloud TPU documentation: peak compute, HBM capacity and
# bandwidth per chip. Link rates are the documented interconnect bandwidth per chip divided by its links (6 in
# a 3D torus, 4 in a 2D one): v4 2400, v5e 1600, v5p 4800, v6e 3200 Gbit/s.
CHIPS = {
    "v4": Chip("v4", 32 * 2**30, 275e12, 1228e9, 50e9, 275e12),
    "v5e": Chip("v5e", 16 * 2**30, 197e12, 819e9, 50e9, 394e12),
    "v5p": Chip("v5p", 95 * 2**30, 459e12, 2765e9, 100e9, 918e12),
    "v6e": Chip("v6e", 32 * 2**30, 918e12, 1640e9, 100e9, 1836e12),
}

# `device_kind` as JAX reports it
_KINDS = {"TPU v4": "v4", "TPU v5 lite": "v5e", "TPU v5": "v5p", "TPU v5p": "v5p", "TPU v6 lite": "v6e"}


@dataclass(frozen=True)
class Slice:
    """A slice: chips in a grid. v4 and v5p names count cores, two per chip; v5e and v6e names count chips."""

    name: str
    chip: Chip
    grid: tuple[int, ...]

    @property
    def n_chips(self) -> int:
        return math.prod(self.grid)

    @property
    def topology(self) -> str:
        """The name used by the TPU compiler, such as `v5e:2x4`."""
        return f"{self.chip.name}:{'x'.join(map(str, self.grid))}"

    @property
    def ici_rate(self) -> float:
        """Bytes/s received by the least connected chip.

        Slices this small do not wrap around, so a corner has one link along each axis of the grid, and a
        collective ends only when every chip has its share, including the corners.
        """
        if self.n_chips == 1:
            return math.inf  # a single chip receives nothing
        return self.chip.link_rate * sum(size > 1 for size in self.grid)

    def to_json(self) -> dict[str, Any]:
        """Its name, number of chips, and compiler name."""
        return {"name": self.name, "chips": self.n_chips, "topology": self.topology}


SLICES = {
    name: Slice(name, CHIPS[name.split("-")[0]], grid)
    for name, grid in {
        "v4-8": (2, 2, 1),
        "v4-16": (2, 2, 2),
        "v4-32": (2, 2, 4),
        "v5e-1": (1, 1),
        "v5e-4": (2, 2),
        "v5e-8": (2, 4),
        "v5e-16": (4, 4),
        "v5e-32": (4, 8),
        "v5p-8": (2, 2, 1),
        "v6e-4": (2, 2),
        "v6e-8": (2, 4),
    }.items()
}


def chip_of(device_kind: str) -> Chip | None:
    """The chip with this `device_kind`; None if it is not a TPU in the table."""
    return CHIPS[_KINDS[device_kind]] if device_kind in _KINDS else None


def slice_of(devices: Sequence[Any]) -> Slice | None:
    """The slice formed by these JAX devices; None if they are not a TPU in the table."""
    chip = chip_of(devices[0].device_kind)
    if chip is None:
        return None
    coordinates = [device.coords for device in devices]
    grid = tuple(max(axis) - min(axis) + 1 for axis in zip(*coordinates, strict=True))
    return Slice(f"{len(devices)} {chip.name} chips", chip, grid)


def slice_named(name: str) -> Slice:
    """The slice with this Cloud TPU name.

    Raises:
      UserError: the name is not in the table.
    """
    if name not in SLICES:
        raise UserError(f"--topology: {name!r} is not known; give one of {', '.join(SLICES)}, or all")
    return SLICES[name]


# --- Rates and memory ---------------------------------------------------------------------------------------

# Dense bf16 peak FLOP/s and memory bytes/s of GPUs, by a part of `device_kind`, from NVIDIA's data sheets
# (H100 SXM, A100 80 GB).
_PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12}
_MEMORY_RATES = {"H200": 4800e9, "H100": 3350e9, "A100": 2039e9}


def peak_flops(device: jax.Device) -> float | None:
    """Dense bf16 peak of one device in FLOP/s, or None if unknown (a CPU)."""
    if (chip := chip_of(device.device_kind)) is not None:
        return chip.flops
    return next((rate for name, rate in _PEAK_FLOPS.items() if name in device.device_kind), None)


def compute_capability(device: Any) -> tuple[int, ...]:
    """Compute capability of an NVIDIA GPU: (9, 0) on an H100, (8, 9) on an L4; (0,) for any other device."""
    found = re.fullmatch(r"(\d+)\.(\d+)", str(getattr(device, "compute_capability", "")))
    return tuple(map(int, found.groups())) if found else (0,)


def memory_rate_of(device: jax.Device) -> float | None:
    """Peak bytes/s of one device's memory, or None if unknown (a CPU)."""
    if (chip := chip_of(device.device_kind)) is not None:
        return chip.hbm_rate
    return next((rate for name, rate in _MEMORY_RATES.items() if name in device.device_kind), None)


def memory_in_use(device: jax.Device) -> int | None:
    """Peak bytes allocated on the device so far, or None if the platform does not report it."""
    stats = device.memory_stats()
    return stats.get("peak_bytes_in_use") if stats else None


def memory_of(device: jax.Device) -> int | None:
    """Bytes that programs on the device (for a CPU, this process) may use, or None if unknown."""
    if device.platform == "cpu":
        return _host_memory()
    stats = device.memory_stats()
    if stats and stats.get("bytes_limit"):
        return int(stats["bytes_limit"])
    chip = chip_of(device.device_kind)
    return None if chip is None else int(chip.hbm_bytes)


def _host_memory() -> int | None:
    """The machine's memory, or the limit of this process's control group if that is lower."""
    try:
        whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):
        return None
    for file in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError):  # "max" is not a number: no limit
            whole = min(whole, int(Path(file).read_text()))
    return whole


def out_of_memory(message: str) -> int | None:
    """Bytes that a program needs beyond a chip's memory, from the compiler's error; None for other errors.

    The compiler says `Used 20.95G of 15.75G hbm. Exceeded hbm capacity by 5.20G.`, or `the total memory
    required for HLO temporaries (16.24G) exceeds available HBM (15.75G)`.
    """
    if match := re.search(r"Exceeded hbm capacity by ([\d.]+)([KMG]?)", message):
        return _bytes(*match.groups())
    if match := re.search(r"\(([\d.]+)([KMG]?)\) exceeds available HBM \(([\d.]+)([KMG]?)\)", message):
        return _bytes(*match.groups()[:2]) - _bytes(*match.groups()[2:])
    return None


def _bytes(number: str, unit: str) -> int:
    return int(float(number) * {"": 1, "K": 2**10, "M": 2**20, "G": 2**30}[unit])


# --- The compiler -------------------------------------------------------------------------------------------


def decoder_options() -> dict[str, Any] | None:
    """Compiler options for prefill and decoding on this machine's devices; None: JAX's defaults.

    For GPUs (measured in `tools/bench.md`):

    - No Triton GEMMs: where XLA tries one, it splits off the preceding norm and computes it once per product.
      2% of a training step.
    - cuBLAS picks its own kernels: they are 1% faster than those found by XLA's autotuning.
    """
    if jax.default_backend() != "gpu":
        return None
    return {"xla_gpu_enable_triton_gemm": False, "xla_gpu_autotune_level": 0}


def decode_options() -> dict[str, Any] | None:
    """Compiler options for decoding: the decoder's, and on GPUs products of the same input are not merged.

    XLA would concatenate the weights of q, k, v and of gate, up anew in every step. With an unmerged adapter,
    as in reinforcement learning, this copies 250 MB per layer: a fifth of a step.
    """
    options = decoder_options()
    return None if options is None else options | {"xla_gpu_dot_merger_threshold_mb": 0}


def step_options(by_line: bool = False) -> dict[str, Any] | None:
    """Compiler options for training and validation steps: the decoder's, and two more on GPUs.

    - The loop over chunks of the output head stays inside the step's CUDA graph. Outside, the host decides
      when the loop stops, and the GPU waits for the host to launch the whole backward pass: 6% of a step.
    - Gathers of steps that run `by_line` are of mapped memory, see `gathers_mapped_memory`.
    """
    options = decoder_options()
    if options is None:
        return None
    options["xla_gpu_enable_command_buffer"] = "FUSION,CUBLAS,CUBLASLT,CUDNN,CUSTOM_CALL,WHILE"
    options["xla_gpu_experimental_enable_nccl_symmetric_buffers"] = by_line and gathers_mapped_memory()
    return options


def gathers_mapped_memory() -> bool:
    """Whether steps gather weights in memory that all GPUs have mapped: those of one process do.

    Under NCCL's policy of zero CTAs, which `setup` asks for, the copy engines gather it. A kernel would wait
    for each product that holds all multiprocessors: 9% of a step with fsdp=2. Under another policy mapped
    memory is slower than that.
    """
    zero_ctas = os.environ.get(NCCL_POLICY) == ZERO_CTAS
    return zero_ctas and jax.default_backend() == "gpu" and jax.process_count() == 1


def scan_layers(layers: str, platform: str) -> bool:
    """Whether layers are scanned. `auto`: unrolled on GPUs, where this is a quarter faster; else scanned."""
    return platform != "gpu" if layers == "auto" else layers == "scan"
