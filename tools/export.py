"""Export what a run selected: `jaxlora export` by path."""

from jaxlora.commands.export import main
from jaxlora.runtime.errors import run_main

if __name__ == "__main__":
    run_main(main)
