"""Build a dataset: `jaxlora data build` by path."""

from jaxlora.commands.build_dataset import main
from jaxlora.runtime.errors import run_main

if __name__ == "__main__":
    run_main(main)
