"""The page of `rlinf inspect`, which shows what a run's model will see. Independent of robots and models."""
