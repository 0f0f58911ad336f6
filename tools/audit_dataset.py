"""Audit a dataset: `jaxlora data audit` by path."""

from jaxlora.commands.audit_dataset import main
from jaxlora.runtime.errors import run_main

if __name__ == "__main__":
    run_main(main)
