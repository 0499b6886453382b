"""The inputs and outputs of the served model.

config.pbtxt, the reader of requests and the documentation's table use this one list.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class TensorSpec:
    """An input or output of the served model.

    Attributes:
        name: of the tensor.
        type: Triton's data type, without `TYPE_`.
        shape: -1 for any length.
        about: description in the documentation.
    """

    name: str
    type: str
    shape: tuple[int, ...]
    about: str


def _number(name: str, kind: str, about: str) -> TensorSpec:
    return TensorSpec(name, kind, (1,), about)


INPUTS = (
    TensorSpec("prompt", "STRING", (1,), "description of the video, UTF-8; this or prompt_embeds"),
    TensorSpec(
        "prompt_embeds",
        "FP32",
        (-1, -1),
        "the text encoder's output for one prompt, (tokens, channels)",
    ),
    _number(
        "num_inference_steps",
        "INT32",
        "transitions of each chunk (causal) or of the video; with a deadline: the maximum",
    ),
    _number(
        "deadline_ms",
        "FP32",
        "time for the transitions of each chunk, or of the video, waiting for other streams"
        " included",
    ),
    _number("seed", "INT64", "of the noise; random if missing, and returned"),
    _number("num_frames", "INT32", "4n+1"),
    _number("height", "INT32", "pixels, a multiple of 16"),
    _number("width", "INT32", "pixels, a multiple of 16"),
    _number("shift", "FP32", "timestep shift"),
    _number("first_steps", "INT32", "causal: transitions of the first chunk"),
    _number("window", "INT32", "causal: newest compressed chunks to keep beside the first"),
    TensorSpec("output_type", "STRING", (1,), "mp4-base64, mp4 (bytes), frames or latents"),
)
"""All are optional, but a request has one of the first two."""

OUTPUTS = (
    _number("chunk", "INT32", "0 for the first"),
    _number("first_frame", "INT32", "the video's frame that this chunk begins with"),
    _number(
        "steps",
        "INT32",
        "its transitions (bidirectional: the first has those of the whole video)",
    ),
    _number("seconds", "FP32", "since the request arrived"),
    _number("deadline_met", "BOOL", "only under a deadline"),
    _number("seed", "INT64", "of the noise"),
    TensorSpec(
        "mp4",
        "STRING",
        (1,),
        "a piece of fragmented mp4, in base64 or bytes; all pieces in order are the file",
    ),
    TensorSpec(
        "frames", "UINT8", (-1, -1, -1, 3), "output_type frames: (frames, height, width, 3)"
    ),
    TensorSpec(
        "latents",
        "FP32",
        (-1, -1, -1, -1),
        "output_type latents: clean, (latent frames, channels, rows, columns)",
    ),
)

SINGLE_OUTPUTS = (
    TensorSpec("steps", "INT32", (-1,), "transitions of each chunk, or of the video"),
    *[port for port in OUTPUTS if port.name not in ("chunk", "first_frame", "steps")],
)
"""Outputs of the model that answers with one response, the whole video."""

OUTPUT_TYPES = {"mp4-base64": "mp4", "mp4": "mp4", "frames": "frames", "latents": "latents"}
"""Values of `output_type`, each with the output that holds the result."""
