"""Learn from rewards as configured by a Python file: `jaxlora rl` by path."""

from jaxlora.commands.rl import main
from jaxlora.runtime.errors import run_main

if __name__ == "__main__":
    run_main(main)
