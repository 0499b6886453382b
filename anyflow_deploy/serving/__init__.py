"""bundle -> HTTP: `anyflow-serve`, for those without Triton.

    request ──► request.py ─► service.py ───────► generator.py ─► video_store.py
    (routes,     what is       a queue with a      text, steps,    the videos,
     websocket)  asked for     bound, one thread   VAE, mp4        bounded on disk

One engine, one thread that makes videos, one after the other; everything else answers meanwhile. A
video is made the same way for every client: it grows in a file, piece by piece, and whoever looks
(poll, WebSocket, the page) reads that file. So a slow or late client costs nothing but its own
connection, and nobody's frames are held in memory.

Cancelling happens between two transitions, or between two pieces of the VAE. What was not finished
leaves no file.

`service.py`, `job.py` and `video_store.py` know nothing of HTTP, and `generator.py` alone knows the
engine. See docs/how-to/serving.md.
"""
