"""Adapters against full fine-tuning: each condition at its own best learning rate.

    jaxlora study --config regret/tiny            # in miniature, on a laptop
    jaxlora study --config regret/rank            # ranks 1 to 512 and full fine-tuning

`arms` says what is compared, `design` which runs that takes, `runs` makes one, `worker` all of them, one
process a device; `fits` and `findings` read the results, and `report` writes them down.
"""
