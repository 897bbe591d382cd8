"""One model trained by several runs that share only an ordinary network (Douillard et al. 2023, arXiv:2311.08105).

Each run is a worker: it makes H optimizer steps of its own, and sends how far its parameters have moved; a server takes
the mean of all workers' movements for the gradient of one step of an outer optimizer, and all go on from its values.
`docs/explain/diloco.md` has the protocol and why it is as it is.
"""
