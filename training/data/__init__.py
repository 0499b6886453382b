"""Training data.

`source` defines what a source is. `shard_source`, `tar_index`, `samples` and `clips` read shards in
a fixed order, `precompute` and `manifest` make them, and `synthetic` and `moving_shapes` are data
that needs no files.
"""
