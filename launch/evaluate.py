"""Evaluate on GSM8K: `jaxlora evaluate` by path."""

from jaxlora.commands.evaluate import main
from jaxlora.runtime.errors import run_main

if __name__ == "__main__":
    run_main(main)
