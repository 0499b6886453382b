"""Building TensorRT plans: what a build can be asked for (`settings`), who does it (`builder`), and
its parts."""
