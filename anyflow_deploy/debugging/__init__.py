"""`anyflow-debug`: the layer where an engine leaves the reference.

`points` names the places that two graphs have in common and marks them as outputs,
`reference_graph` makes a reference of the bundle's own graph, `inputs` makes what both are fed,
`backends` wraps runtimes in Polygraphy's runners, and `divergence` measures with Polygraphy's
Comparator: everything at once, or by `bisection`. `report` shows what came out. Needs no torch.
"""

DETAILS = ("blocks", "layers", "nodes")
"""How finely a graph is looked at, see `points`."""
