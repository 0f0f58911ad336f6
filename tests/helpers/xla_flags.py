"""XLA's flags for tests: simulated CPU devices, and programs that are compiled quickly rather than well."""

from __future__ import annotations

from importlib.metadata import version


def xla_flags(devices: int) -> str:
    """Value of `XLA_FLAGS`. These programs run for milliseconds; better machine code for them costs more than
    it brings. What XLA itself makes of them (layouts, fusions, collectives) stays the same.
    """
    flags = f"--xla_force_host_platform_device_count={devices}"
    if version("jaxlib").startswith("0.10."):  # XLA stops at a flag that it does not know
        flags += " --xla_cpu_use_fusion_emitters=false"
    return flags
