"""The AOTInductor backend: packages of native code that read the bundle's weights.

`engine` runs packages, `compiled_graph` is one of them, `kv_cache` holds a causal stream's keys and
values. `build` has the settings of a build, and `compiler` calls torch's compiler; only those two
need the exporter.
"""
