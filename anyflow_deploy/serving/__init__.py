"""The HTTP service `anyflow-serve`: one bundle for clients without Triton.

    request ──► request.py ─► service.py ───────► generator.py ─► video_store.py
    (routes,     checks        a bounded queue,    text, steps,    the videos,
     websocket)  the request   one thread          VAE, mp4        bounded on disk

One thread with one engine makes videos, one after the other; everything else answers meanwhile. A
video is made the same way for every client: it grows in a file, fragment by fragment, and all
readers (poll, WebSocket, the page) read that file. So a slow or late client costs nothing but its
own connection, and no client's frames are held in memory.

Cancelling happens between two transitions, or between two fragments of the VAE. An unfinished video
leaves no file.

`service.py`, `job.py` and `video_store.py` know nothing of HTTP, and only `generator.py` knows the
engine. docs/how-to/serving.md describes the interface.
"""
