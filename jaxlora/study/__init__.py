"""The study: trials, sweep, comparison, figures and report, each a stage of one command.

Only the stages' names are here, in order, so that `--help` need not import their implementation
(`jaxlora.study.stages`).
"""

STAGE_NAMES = {  # name on the command line: description
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
