"""The claims about learning from rewards: every arm over rates by the loop of `jaxlora.rl`, several seeds.

    jaxlora study --config regret/rl_smollm2

`runs` makes one run, `lab` holds what all of them share, `findings` reads the results, and `report` writes
them down.
"""
