"""What works on this machine, and why not: what `anyflow-doctor` finds out.

Everything here uses the standard library alone, so that it also runs where nothing else does.
`probes.PROBES` is the table of all that is looked at; what may be slow or dangerous to import is
imported in a process of its own (`subprocess_probe`).
"""
