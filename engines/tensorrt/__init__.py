"""The TensorRT backend: plans built for one GPU.

`engine` runs them, `execution` owns CUDA streams, contexts and graphs, `cuda` and `api` are the
only doors to cuda-python and TensorRT. Plans are made in `build`; `lint` reads a graph for what
TensorRT's parser would refuse and needs no TensorRT.
"""
