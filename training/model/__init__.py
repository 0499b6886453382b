"""The network in training.

`network` is the module, `lora` adapts it, `model_factory` builds and shards it, `weight_init` has
its initial weights, and `memory` estimates the memory it needs.
"""
