"""The `shapes` models: small AnyFlow pipelines that are trained here, from nothing.

`scenes` and `rendering` make videos with captions; `vae`, `text_encoder` and the recipes of this
project train every part of a pipeline on them; `reader` tells what a video shows, so that it can be
measured whether a generated one shows what its prompt asks for. `python -m anyflow_deploy.shapes
FOLDER` runs all of it, in order.
"""
