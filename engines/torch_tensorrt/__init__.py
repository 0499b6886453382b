"""The torch-tensorrt backend: a bundle's program compiled by torch, with TensorRT inside.

`engine` runs it, `build` says what a build can be asked for, and `compiler` makes it; those two
alone need the exporter.
"""
