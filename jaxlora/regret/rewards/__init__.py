"""Test the claims about learning from rewards: every arm over rates and seeds, by the loop of `jaxlora.rl`.

    jaxlora study --config regret/rl_smollm2

`runs` makes one run, `lab` holds what all of them share, `findings` analyses the results, and `report` writes
them up.
"""
