"""The study: trials, sweep, comparison, figures and report, each a stage of one command.

Here are the stages' names alone, in their order, so that `--help` need not import what they do
(`jaxlora.study.stages`).
"""

STAGE_NAMES = {  # name on the command line: what it is, for people
    "gates": "data gates",
    "baseline": "untouched baseline",
    "learning-rates": "learning-rate trials",
    "sweep": "main sweep",
    "selection": "selection of checkpoints",
    "export": "export of the selected adapters",
    "evaluation": "evaluation of the selected adapters",
    "comparison": "comparison",
    "figures": "figures and tables",
    "report": "report",
}
