"""The profiler: how long everything takes on this machine, what limits it, what to do.

`profiler` runs a bundle and fills a `record.Profile`; everything else either measures one thing for
it (`timing`, `memory`, `power`, `layers`, `stages`, `roofline`) or shows a finished one
(`terminal`, `html_report`, `compare`). A profile is JSON, so what was measured on a device can be
looked at elsewhere. It needs no torch, unless the text encoder and the VAE are timed, too.
"""
