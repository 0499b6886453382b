"""8-bit export: measure ranges, plan scales, rewrite graphs, and count the 8-bit products.

`calibrate` measures ranges (of the `prompts` and `rollouts`, with the `observers`;
`calibration_checkpoint` lets it resume), `plan` decides which layers are quantized with which
scales, `qdq_pass` inserts Q/DQ into the graphs, `precision_report` counts the products that are
really 8-bit. `fake_quant` and `quantized_linear` are the same grids in PyTorch, `matmul_parity`
compares every product with them, and `sensitivity` finds the layers to keep in full precision.
"""
