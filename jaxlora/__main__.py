"""`python -m jaxlora`: the command when its script is not installed."""

from jaxlora.commands import run

if __name__ == "__main__":
    run()
