"""The ONNX Runtime backend: it runs a bundle as it is, on every machine.

`engine` opens the sessions, `kv_cache` holds a causal stream's keys and values, `graph_rewrites`
fuses attention when a session is opened, `int8` tests whether a processor adds integers without
overflow, `profiler` times layers.
"""
