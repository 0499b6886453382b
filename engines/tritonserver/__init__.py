"""bundle -> Triton Inference Server: `anyflow-triton` writes a model repository, and the server
runs what is here.

    request ─► model.py ─► request.py ─► admission.py ─► generator.py ─► model.py ─► response for
    every chunk
               (Triton's    tensors to    streams, cache,  text, steps,    (Triton's
                types)      a request     queue: bounded   VAE, mp4        types)

A decoupled model of the Python backend: one request, a response for every chunk. Each request has a
thread of its own, and the device is one: the threads take turns on it, in order, between
transitions (`fair_lock.py`). So streams advance side by side, and a cancelled one ends before its
next transition.

`model.py` and `metrics.py` alone speak Triton's Python; everything else runs and is tested without
a server. `io_spec.py` is the one list of inputs and outputs, for the configuration, the reader and
the documentation's table. See docs/how-to/triton.md.
"""
