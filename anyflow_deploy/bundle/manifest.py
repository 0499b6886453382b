"""`manifest.json`: everything a runtime must know about a bundle, typed.

Tensor names, shapes and types are written here once, by the exporter; Python, C++ and Triton read
them from here. The classes are pydantic models because a manifest crosses machines and versions:
unknown keys, wrong types and newer schemas are refused by name instead of being misread.
See docs/reference/bundle.md for the format in prose.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any, Literal

from pydantic import (
    Field,
    PositiveInt,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)

from anyflow_deploy.bundle.json_records import FrozenRecord
from anyflow_deploy.errors import BundleError, CheckpointError
from anyflow_deploy.models import Architecture, architecture_from_config
from anyflow_deploy.shape_ranges import AXES, Range, ShapeRanges, latent_frames, latent_side

SCHEMA = 1
"""Raised whenever a reader of the old schema would misread a bundle of the new one."""

GRAPHS = {"bidirectional": ("transition",), "causal": ("text", "chunk", "compress")}
"""Which graphs a bundle of each kind holds."""

MANIFEST = "manifest.json"
WEIGHTS = "weights.safetensors"


TensorType = Literal["float32", "float16", "bfloat16", "int64"]


class GraphTensor(FrozenRecord):
    """An input or output of a graph. Axes are numbers, or the name of a declared range."""

    name: str
    dtype: TensorType
    shape: list[int | str]


class GraphRecord(FrozenRecord):
    """One ONNX file."""

    file: str
    opset: int
    inputs: list[GraphTensor]
    outputs: list[GraphTensor]


class WeightsSource(FrozenRecord):
    """Where the weights came from: a folder, a repository on the Hub, or a seed.

    `revision` is the Hub's commit. `location` of a folder (or file) is a hint for later commands;
    they accept another one. `variant` is that of the files, such as "fp16".
    """

    kind: Literal["folder", "hub", "random"]
    location: str
    revision: str | None = None
    seed: int | None = None
    variant: str | None = None

    @model_serializer(mode="wrap")
    def _leave_out_variant(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Write `variant` where there is one; older versions do not know the key."""
        content: dict[str, Any] = serialize(self)
        if self.variant is None:
            content.pop("variant", None)
        return content


class AchievedPrecision(FrozenRecord):
    """What the files really hold, counted from the finished graphs.

    Args:
        weight_bytes: bytes of weights by type.
        quantized_flops: share of the operations in matrix products, at the default video size, that
            take both operands in eight bits.
        quantized_weights: share of the bytes of weights that are in eight bits.
        full_precision_layers: layers that a quantized precision left in the base's type, and why.
    """

    weight_bytes: dict[str, int]
    quantized_flops: float = 0.0
    quantized_weights: float = 0.0
    full_precision_layers: dict[str, str] = Field(default_factory=dict)


class Quantization(FrozenRecord):
    """How a quantized bundle was made.

    Args:
        base: precision of everything that is not quantized.
        smooth: whether SmoothQuant moved outliers from activations into weights.
        attention: "high" (the base) or "fp8".
        weights: fingerprint of the weights that the calibration was made on.
    """

    base: str
    smooth: bool
    attention: Literal["high", "fp8"]
    weights: str


class VideoDefaults(FrozenRecord):
    """How latents relate to pixels.

    Args:
        spatial_factor, temporal_factor: pixels per latent side, and video frames per latent frame
            after the first.
        fps: playback rate the model was trained for.
        text_tokens: length that prompt embeddings are padded to, with zeros, as in training.
        frames, height, width: default size of a video, in frames and pixels.
    """

    spatial_factor: PositiveInt
    temporal_factor: PositiveInt
    fps: int
    text_tokens: int
    frames: int
    height: int
    width: int


class ScheduleDefaults(FrozenRecord):
    """What the model was distilled with; every call may choose otherwise."""

    shift: float
    steps: int


class FileRecord(FrozenRecord):
    """Size and SHA-256 (hexadecimal) of one file of the bundle."""

    bytes: int
    sha256: str


class AxisRange(FrozenRecord):
    """One `Range` in the manifest's form; a `maximum` of null means no limit."""

    minimum: int
    maximum: int | None
    multiple: int


class Manifest(FrozenRecord):
    """The whole manifest. `files` lists every file of the bundle but the manifest itself.

    `attention_op` says how the graphs write attention: ONNX's operator `Attention`, or MatMul,
    Softmax and MatMul. None in bundles of 0.2.0, which had the operator at opset 23 only.
    """

    schema_version: int = Field(default=SCHEMA, alias="schema")
    kind: Literal["bidirectional", "causal"]
    model: str
    config: dict[str, Any]
    source: WeightsSource
    precision: str
    quantization: Quantization | None = None
    achieved: AchievedPrecision
    target: str
    attention_op: Literal["attention", "primitive"] | None = None
    graphs: dict[str, GraphRecord]
    ranges: dict[str, AxisRange]
    schedule: ScheduleDefaults
    video: VideoDefaults
    tools: dict[str, str]
    files: dict[str, FileRecord]

    @property
    def base(self) -> str:
        """The precision of everything that is not quantized."""
        return self.quantization.base if self.quantization else self.precision

    @cached_property
    def architecture(self) -> Architecture:
        """The transformer's numbers, read from `config` once.

        Raises:
            CheckpointError: `config` is not an AnyFlow transformer's, or not as exports write it:
                all keys, and no other spelling.
        """
        architecture = architecture_from_config(self.config, MANIFEST)
        expected = architecture.as_config()
        if missing := sorted(expected.keys() - self.config.keys()):
            raise CheckpointError(f"{MANIFEST} lacks {', '.join(missing)} in its config.")
        if others := sorted(key for key in expected if self.config[key] != expected[key]):
            raise CheckpointError(
                f"{MANIFEST} has {others[0]} {self.config[others[0]]!r} in its config, where an"
                f" export writes {expected[others[0]]!r}."
            )
        return architecture

    def latent_shape(
        self, frames: int | None, height: int | None, width: int | None
    ) -> tuple[int, int, int, int]:
        """Return (F, C, H, W) of a video's latents; None stands for the default size.

        The rules of the VAE and of the patches decide.

        Args:
            frames: 4n+1.
            height, width: pixels, multiples of 16.

        Raises:
            ShapeError: naming the nearest size that is allowed.
        """
        video, a = self.video, self.architecture
        patch = a.patch_size[1]
        count = latent_frames(frames or video.frames, video.temporal_factor)
        rows = latent_side(height or video.height, video.spatial_factor, patch, "height")
        columns = latent_side(width or video.width, video.spatial_factor, patch, "width")
        return count, a.in_channels, rows, columns

    @model_validator(mode="after")
    def _check_graphs(self) -> Manifest:
        if set(self.graphs) != set(GRAPHS[self.kind]):
            raise ValueError(
                f"a {self.kind} bundle holds {', '.join(GRAPHS[self.kind])}, not"
                f" {', '.join(self.graphs)}"
            )
        return self

    @cached_property
    def shape_ranges(self) -> ShapeRanges:
        """The declared ranges, ready to check shapes with; made once.

        Raises:
            BundleError: ranges of other axes than a bundle has.
        """
        if set(self.ranges) != set(AXES):
            raise BundleError(
                f"its ranges are of {', '.join(self.ranges)}; expected are {', '.join(AXES)}."
            )
        return ShapeRanges(
            **{axis: Range(r.minimum, r.maximum, r.multiple) for axis, r in self.ranges.items()}
        )


def records_from_ranges(ranges: ShapeRanges) -> dict[str, AxisRange]:
    """Convert `ShapeRanges` to the manifest's form."""
    return {
        axis: AxisRange(minimum=r.minimum, maximum=r.maximum, multiple=r.multiple)
        for axis, r in vars(ranges).items()
    }
