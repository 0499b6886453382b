"""The AOTInductor backend: packages of native code that read the bundle's weights.

`engine` runs packages, `compiled_graph` is one of them, `kv_cache` holds a causal stream's keys and
values. `build` says what a build can be asked for, and `compiler` calls torch's compiler; those two
alone need the exporter.
"""
