"""Run the data gates: `jaxlora data check` by path."""

from jaxlora.commands.check_dataset import main
from jaxlora.runtime.errors import run_main

if __name__ == "__main__":
    run_main(main)
