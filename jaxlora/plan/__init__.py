"""Ahead-of-time plans for Cloud TPU slices: compile the real programs without a TPU, and count.

`chips` is the table of chips and slices, `hlo` counts a compiled program's work, `roofline` turns work into
time, `programs` compiles, `search` ranks meshes, `report` prints.
"""
