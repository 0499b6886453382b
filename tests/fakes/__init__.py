"""Fakes of what a test machine lacks, and samples made up for tests: TensorRT, CUDA, a C++ backend,
a video generator."""
