"""A bundle in Triton Inference Server.

`anyflow-triton` writes a model repository, and the server runs this package:

    request ─► model.py ─► request.py ─► admission.py ─► generator.py ─► model.py ─► a response
               Triton's    tensors to    streams, cache  text, steps,    Triton's    for every
               types       a request     and queue       VAE, mp4        types       chunk

The model is a decoupled model of the Python backend: one request gets a response for every chunk.
Each request has a thread of its own. The threads share one device and take turns on it, in order,
between transitions (`fair_lock.py`). So streams advance side by side, and a cancelled one ends
before its next transition.

Only `model.py` and `metrics.py` use Triton's Python interface; everything else runs and is tested
without a server. `io_spec.py` is the one list of inputs and outputs, for the configuration, the
reader and the documentation's table. See docs/how-to/triton.md.
"""
