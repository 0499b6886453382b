"""checkpoint -> bundle: the half of the project where torch and diffusers live.

    anyflow-export --checkpoint DIR --precision fp16 --output BUNDLE

The stations, in order: `checkpoint` finds the weights, `transformer` is the network as one traceable module, `trace`
turns it into a graph without weights, `onnx_graph` writes that graph as ONNX, `weights` streams the weights beside it,
and `exporter` does all of it into a bundle. `reference` runs the same checkpoint in PyTorch for comparison, and `tiny`
makes a complete small pipeline so that everything can be tried without a download.
"""
