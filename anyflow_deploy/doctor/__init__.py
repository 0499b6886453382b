"""The probes of `anyflow-doctor`: what works on this machine, and why not.

Everything here uses the standard library alone, so that it also runs where nothing else does.
`probes.PROBES` is the table of all probes. Imports that may be slow or crash run in a process of
their own (`subprocess_probe`).
"""
