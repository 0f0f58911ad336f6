"""Measure training and decoding: `jaxlora bench` by path."""

from jaxlora.commands.bench import main
from jaxlora.runtime.errors import run_main

if __name__ == "__main__":
    run_main(main)
