"""How much memory a model takes, without torch.

`parameter_shapes` lists every parameter, `estimate` adds up weights, activations and cache.
"""
