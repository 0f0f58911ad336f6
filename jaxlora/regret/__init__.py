"""Adapters against full fine-tuning: each condition at its own best learning rate.

    jaxlora study --config regret/tiny            # in miniature, on a laptop
    jaxlora study --config regret/rank            # ranks 1 to 512 and full fine-tuning

`arms` defines the conditions, `design` the runs needed to compare them; `runs` makes one run, `worker` makes
all of them, one process per device; `fits` and `findings` analyse the results, and `report` writes them up.
"""
