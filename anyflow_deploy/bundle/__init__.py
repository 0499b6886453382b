"""The bundle: the folder that crosses from export to engines.

`bundle` opens and writes one, `manifest` is its manifest.json, typed; `atomic_io` writes files and
folders whole or not at all, and `json_records` reads JSON files with a schema.
"""
