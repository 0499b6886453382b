"""The ONNX Runtime backend: it runs a bundle as it is, on every machine.

`engine` opens the sessions, `kv_cache` holds a causal stream's keys and values, `graph_rewrites`
fuses attention on the way into a session, `int8` knows which processors add integers without
overflow, `profiler` times layers.
"""
