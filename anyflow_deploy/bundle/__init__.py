"""The bundle: the folder that crosses from export to engines.

`bundle` opens and writes one, `manifest` is its manifest.json, typed; `atomic_io` writes folders atomically and
`json_records` JSON files.
"""
