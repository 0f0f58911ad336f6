"""The machine: JAX settings, peak rates, memory.

setup(config)                       # once, before the first array
peak_flops(jax.devices()[0])        # 989e12 on an H100
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import jax

from jaxlora.config import RunConfig
from jaxlora.models.attention import pick_decode_backend
from jaxlora.runtime import hosts
from jaxlora.runtime.chips import chip_of
from jaxlora.runtime.progress import console

# Dense bf16 peak of GPUs in FLOP/s by a part of `device_kind`, from the maker's data sheets.
_PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12}


def cache_folder(config: RunConfig) -> Path:
    """Where compiled programs are kept: $JAX_COMPILATION_CACHE_DIR, or ~/.cache/jaxlora/compiled.

    Of several hosts only the first one writes them, so all read them from the folder that they share.
    """
    if named := os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        return Path(named)
    if hosts.n_processes() > 1:
        return Path(config.results_dir).resolve() / ".compiled"
    return Path.home() / ".cache" / "jaxlora" / "compiled"


def setup(config: RunConfig) -> None:
    """What must precede the first array: memory, hosts, compiled programs, float32 products."""
    # JAX would leave a quarter of a GPU unused: decoding and groups of runs fill it.
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.92")
    hosts.start()
    console.quiet = not hosts.is_first()
    jax.config.update("jax_compilation_cache_dir", str(cache_folder(config)))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)
    if config.model.dtype == "float32":  # GPUs and TPUs would multiply float32 in fewer bits
        jax.config.update("jax_default_matmul_precision", "highest")


def peak_flops(device: jax.Device) -> float | None:
    """Dense bf16 peak of one device in FLOP/s, or None where it is not known (a CPU)."""
    if (chip := chip_of(device.device_kind)) is not None:
        return chip.flops
    return next((rate for name, rate in _PEAK_FLOPS.items() if name in device.device_kind), None)


def memory_in_use(device: jax.Device) -> int | None:
    """Peak bytes allocated on the device so far, or None where the platform does not say."""
    stats = device.memory_stats()
    return stats.get("peak_bytes_in_use") if stats else None


def decode_backend(dtype: str, asked: str = "auto") -> str:
    """Attention of the decoder on this machine's devices."""
    return pick_decode_backend(asked, jax.default_backend(), dtype, jax.device_count())


def decoder_options() -> dict[str, Any] | None:
    """What prefill and decoding are compiled with on this machine's devices; None: as JAX does.

    For GPUs (measured in `tools/bench.md`):

    - No Triton products: where XLA tries one, it splits off the norm before it, and computes that once for
      each product. 2% of a training step.
    - cuBLAS picks its own kernels: they are faster than those that XLA finds by trying, by 1%.
    """
    if jax.default_backend() != "gpu":
        return None
    return {"xla_gpu_enable_triton_gemm": False, "xla_gpu_autotune_level": 0}


def step_options() -> dict[str, Any] | None:
    """What training and validation steps are compiled with: as the decoder, and on a GPU one thing more.

    The loop over chunks of answers runs inside the CUDA graph of the step. Left outside, it lets the host
    decide when to stop, and the GPU waits for the host to launch the whole backward pass: 6% of a step.
    """
    options = decoder_options()
    graphs = "FUSION,CUBLAS,CUBLASLT,CUDNN,CUSTOM_CALL,WHILE"
    return None if options is None else options | {"xla_gpu_enable_command_buffer": graphs}


def scan_layers(layers: str, platform: str) -> bool:
    """Whether layers are scanned. `auto`: unrolled on GPUs, where it runs a quarter faster; else scanned."""
    return platform != "gpu" if layers == "auto" else layers == "scan"
