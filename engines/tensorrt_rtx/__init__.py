"""The TensorRT for RTX backend: plans for GeForce RTX cards, built on any x86-64 machine.

It is the tensorrt backend with NVIDIA's other library behind it (`engines.tensorrt.library`). Here
is what differs: `settings` and `builder_config` name the GPU to build for, and `engine` opens plans
whose kernels are compiled when they are opened.
"""
