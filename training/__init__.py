"""Trains an AnyFlow checkpoint from a Wan2.1 checkpoint and data: teacher, flow map, on policy.

    python -m anyflow_deploy.train flow-map-tiny --output runs/tiny

Read `model.network` (the module that is trained), `chunks` (bidirectional and causal as one plan),
`losses`, `rollout`, then `trainer`. docs/how-to/training.md explains the method.
"""
