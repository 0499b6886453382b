"""Checkpoints: where they are, what is in them, and their weights one tensor at a time.

`checkpoint` opens a folder, `hub` downloads one, `weights` streams tensors, `safetensors_stream` is
the file format and `dtypes` its types; `random_weights` and `tiny` make checkpoints that need no
download. It needs torch.
"""
