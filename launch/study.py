"""The whole study as one command: `jaxlora study` by path."""

from jaxlora.commands.study import main
from jaxlora.runtime.errors import run_main

if __name__ == "__main__":
    run_main(main)
