"""Ahead-of-time plans for Cloud TPU slices: compile the real programs without a TPU, and count their work.

`hlo` counts the work of a compiled program, `programs` compiles a run's programs, `report` makes and prints
plans. The slices are those of `jaxlora.runtime.devices`; the cost model is that of `jaxlora.estimate`.
"""
