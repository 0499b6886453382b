"""Data for training: what a source is (`source`), shards and the order of their samples
(`shard_source`, `tar_index`, `samples`, `clips`), how they are made (`precompute`, `manifest`), and
data that needs no files (`synthetic`, `moving_shapes`).
"""
