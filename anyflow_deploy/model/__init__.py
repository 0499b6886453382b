"""The network as one traceable module (`transformer`), its positions (`rotary`) and its causal form
(`causal`).

Export records it, training subclasses it, and builds of compiled engines rebuild it from a bundle.
It needs torch.
"""
