"""The torch-tensorrt backend: a bundle's program compiled by torch, with TensorRT inside.

`engine` runs it, `build` has the settings of a build, and `compiler` compiles it; only the last two
need the exporter.
"""
