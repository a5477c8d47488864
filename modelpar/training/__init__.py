"""How it learns: steps, rates, checkpoints and what a run shows; knows no Hydra."""
