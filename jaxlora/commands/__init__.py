"""The command `jaxlora`: one module per subcommand, each with a `main` that reads `sys.argv`.

    jaxlora train --config tiny
    jaxlora data check DIR --benchmark openai/gsm8k

The scripts in `launch/` and `tools/` call the same functions. JAX and other slow modules are imported inside
functions, so that `--help` and mistakes get an immediate answer.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import sys
from collections.abc import Mapping

from jaxlora.cli import HelpFormatter
from jaxlora.runtime.errors import UserError, run_main

DESCRIPTION = "LoRA and full fine-tuning of language models on Cloud TPUs, GPUs and CPUs."

COMMANDS = {
    "train": "fine-tune according to a configuration; the same command resumes",
    "study": "run trials, sweep, evaluation and report with one command",
    "rl": "learn from rewards: sample, grade, update; the same command resumes",
    "evaluate": "score a run, the base or an adapter on a benchmark",
    "generate": "answer the prompts in a file",
    "chat": "chat with a run, an adapter or the base",
    "export": "export a run's selected weights: a PEFT adapter, a merged model",
    "preview": "show rows as the model will see them",
    "plan": "estimate memory, time and cost on a TPU slice, without needing one",
    "bench": "benchmark training, decoding and learning from rewards",
    "capacity": "estimate the rank that rows call for, by a rule of thumb",
    "data": "build, check and audit datasets",
}
OF_DATA = {
    "build": "stream a source; filter, group, split and render its rows",
    "check": "run the data gates and write the report that training requires",
    "audit": "report quality and token statistics, and sample rows for human review",
    "bench": "measure the time and memory for preparing rows",
}


def run() -> None:
    """The entry point of the console script."""
    run_main(main)


def main() -> int | None:
    """Run the command that `sys.argv` names.

    Raises:
      UserError: there is no such command, or its input is wrong.
    """
    name = _chosen("jaxlora", DESCRIPTION, COMMANDS)
    if name == "data":
        name = f"{_chosen('jaxlora data', 'Build, check and audit datasets.', OF_DATA)}_dataset"
    return importlib.import_module(f"jaxlora.commands.{name}").main()


def _chosen(program: str, description: str, commands: Mapping[str, str]) -> str:
    """Remove the command's name from `sys.argv` and return it; the rest belongs to the command."""
    if len(sys.argv) > 1 and sys.argv[1] in commands:
        name = sys.argv.pop(1)
        sys.argv[0] = f"{program} {name}"
        return name
    width = max(map(len, commands)) + 2
    listed = "\n".join(f"  {name:<{width}}{text}" for name, text in commands.items())
    parser = argparse.ArgumentParser(program, f"{program} COMMAND [options]", formatter_class=HelpFormatter)
    parser.description = (
        f"{description}\n\ncommands:\n{listed}\n\n`{program} COMMAND --help` shows the options of one."
    )
    if program == "jaxlora":
        parser.add_argument("--version", action="version", version=f"jaxlora {_version()}")
    if len(sys.argv) > 1 and not sys.argv[1].startswith("-"):
        close = difflib.get_close_matches(sys.argv[1], commands, n=1)
        advice = f"did you mean {close[0]}?" if close else f"give one of {', '.join(commands)}"
        raise UserError(f"{program}: no command {sys.argv[1]!r:.80}; {advice}")
    parser.parse_args()
    raise UserError(f"{program}: name a command: {', '.join(commands)}")


def _version() -> str:
    import jaxlora

    return jaxlora.__version__
