"""The bundle: the folder that export writes and engines read.

`bundle` opens and writes one, `manifest` is its manifest.json, typed; `atomic_io` writes files and
folders whole or not at all, and `json_records` reads JSON files with a schema.
"""
