"""Fine-tune as configured by a Python file: `jaxlora train` by path."""

from jaxlora.commands.train import main
from jaxlora.runtime.errors import run_main

if __name__ == "__main__":
    run_main(main)
