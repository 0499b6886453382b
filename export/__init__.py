"""Checkpoint to bundle: the half of the project that uses torch and diffusers.

    anyflow-export --checkpoint DIR --precision fp16 --output BUNDLE

`anyflow_deploy.checkpoints` finds the weights and `anyflow_deploy.model` is the network as one
traceable module. From them `trace` records a graph without weights, `onnx_graph` translates that
graph to ONNX, and `exporter` writes it and the weights into a bundle. `quantization` does the same
in 8 bits. `torch_engine` and `diffusers_engine` run the checkpoint in PyTorch for comparison, and
`program` rebuilds the program from a bundle for engines that are compiled from it.
"""
