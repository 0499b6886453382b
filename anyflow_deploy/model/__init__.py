"""The network as one traceable module, its positions and its causal form.

`transformer` is the module, `rotary` its positions, `causal` its causal form. Export records it,
training subclasses it, and builds of compiled engines rebuild it from a bundle. It needs torch.
"""
