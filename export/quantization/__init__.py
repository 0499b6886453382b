"""8-bit export: measure ranges, plan scales, rewrite graphs, and count what came of it.

`calibrate` measures (`prompts` and `rollouts` say on what, `observers` how,
`calibration_checkpoint` lets it resume), `plan` decides which layers are quantized with which
scales, `qdq_pass` puts Q/DQ into the graphs, `precision_report` counts the products that are really
8-bit. `fake_quant` and `quantized_linear` are the same grids in PyTorch, `matmul_parity` holds
every product against them, and `sensitivity` finds the layers to keep in full precision.
"""
