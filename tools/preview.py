"""Show rows as the model will see them: `jaxlora preview` by path."""

from jaxlora.commands.preview import main
from jaxlora.runtime.errors import run_main

if __name__ == "__main__":
    run_main(main)
