"""Plan a run on a Cloud TPU slice without the slice: `jaxlora plan` by path."""

from jaxlora.commands.plan import main
from jaxlora.runtime.errors import run_main

if __name__ == "__main__":
    run_main(main)
