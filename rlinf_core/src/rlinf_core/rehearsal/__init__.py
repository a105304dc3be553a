"""`rlinf rehearse`: a run's construction and two steps on as many ranks as it will have, without a GPU or values.

`fake_cuda` makes CUDA tensors without CUDA, `collectives` hears what ranks exchange, `rank` is one rank's rehearsal,
`compare` the whole one, beside what `rlinf plan` predicts.
"""
