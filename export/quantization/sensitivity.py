"""Measures which layers suffer most from 8 bits, and selects those to keep in full precision.

Each layer is quantized alone, videos are generated at a few step counts, and compared with those of
the unquantized network from the same noise: that ranks the layers. Errors do not add up (those of
one layer hide or increase those of another), so the number of layers to keep cannot be read off the
ranking. `select_full_precision_layers` measures it again: it quantizes all but the n worst,
generates the videos, and bisects n.

A list of layers does not carry over to another model: it depends on depth, and on the weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from pydantic import Field
from torch import Tensor

from anyflow_deploy.bundle.atomic_io import write_text_atomically
from anyflow_deploy.bundle.json_records import FrozenRecord, load_record
from anyflow_deploy.bundle.outputs import OutputFile
from anyflow_deploy.checkpoints.weights import Weights
from anyflow_deploy.engines.engine import Array
from anyflow_deploy.engines.metrics import Difference, difference
from anyflow_deploy.engines.sampler import noise
from anyflow_deploy.errors import AnyFlowError
from anyflow_deploy.export.quantization.fake_quant import FakeQuant
from anyflow_deploy.export.quantization.rollouts import run_rollout
from anyflow_deploy.export.torch_engine import TorchEngine
from anyflow_deploy.progress import NullProgress, Progress
from anyflow_deploy.quantization.calibration import Calibration
from anyflow_deploy.schedule import Schedule

SENSITIVITY = "sensitivity.json"
STEPS = (1, 4)


class QuantizationError(FrozenRecord):
    """The error of a video with some layers quantized, at the step count where it is worst.

    Attributes:
        relative_l2: |quantized - unquantized| / |unquantized|; None where the video is not finite.
        psnr_db: peak signal to noise; None where the two are equal.
    """

    relative_l2: float | None
    psnr_db: float | None


class Sensitivity(FrozenRecord):
    """The contents of `sensitivity.json`.

    Attributes:
        weights: their fingerprint.
        precision: of the quantized layers.
        steps, shape, seed: of the videos.
        layers: by layer, the error of quantizing it alone, the worst first.
        excluded: by candidate that cannot be quantized, the reason.
        kept: by number of worst layers kept in full precision, the error of quantizing all others.
    """

    schema_version: int = Field(default=1, alias="schema")
    weights: str
    precision: str
    steps: list[int]
    shape: list[int]
    seed: int
    layers: dict[str, QuantizationError]
    excluded: dict[str, str]
    kept: dict[int, QuantizationError] = Field(default_factory=dict)


@dataclass(frozen=True)
class SensitivitySettings:
    """The settings of the videos that are compared.

    Attributes:
        text: embeddings (1, L, D) of a prompt.
        shape: (F, C, H, W) of the latents; small ones rank as large ones do.
        steps: step counts.
        seed: of the noise.
        device: torch device.
        attention: attentions whose products are quantized in every measurement, see `FakeQuant`.
    """

    text: Array
    shape: tuple[int, int, int, int]
    steps: tuple[int, ...] = STEPS
    seed: int = 0
    device: str = "cpu"
    attention: tuple[str, ...] = ()


class SensitivityAnalyzer:
    """Generates videos with some layers quantized, and compares them with the unquantized.

    Args:
        weights: of the model.
        calibration: of the same weights.
        precision: "int8" or "fp8".
        settings: see `SensitivitySettings`.
        smooth: SmoothQuant's factors, see `FakeQuant`.

    Attributes:
        layers: those that can be quantized.
        excluded: by layer that cannot be quantized, the reason.
    """

    def __init__(
        self,
        weights: Weights,
        calibration: Calibration,
        precision: str,
        settings: SensitivitySettings,
        smooth: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.settings = settings
        self.precision = precision
        self.fingerprint = calibration.weights
        self._engine = TorchEngine(weights, settings.device)
        self._schedules = [Schedule.uniform(steps, calibration.shift) for steps in settings.steps]
        self._noise = noise((1, *settings.shape), settings.seed)
        self._reference = self._generate_videos()
        a = weights.architecture
        self._fake_quant = FakeQuant(
            self._engine.network, a, calibration, precision, (), smooth, settings.attention
        )
        self.layers = self._fake_quant.layers
        self.excluded = self._fake_quant.excluded

    def measure_layer(self, layer: str) -> QuantizationError:
        """Quantize one layer, and measure the error."""
        self._fake_quant.quantize_only([layer])
        return self._measure_error()

    def measure_all_except(self, full_precision_layers: Collection[str]) -> QuantizationError:
        """Quantize all layers but these, and measure the error."""
        self._fake_quant.keep_layers(full_precision_layers)
        return self._measure_error()

    def psnr_all_except(self, full_precision_layers: Collection[str]) -> float:
        """Quantize all layers but these, and return the PSNR in decibels.

        It is infinite for equal videos, and minus infinite for one that is not finite.
        """
        return psnr_from_error(self.measure_all_except(full_precision_layers))

    def _generate_videos(self) -> list[Array]:
        return [
            run_rollout(self._engine, self._noise, self.settings.text, schedule)
            for schedule in self._schedules
        ]

    def _measure_error(self) -> QuantizationError:
        differences = [
            difference(*pair) for pair in zip(self._generate_videos(), self._reference, strict=True)
        ]
        worst: Difference = max(differences, key=lambda d: d.relative_l2)
        return QuantizationError(
            relative_l2=_finite(worst.relative_l2),
            psnr_db=_finite(min(d.psnr_db for d in differences)),
        )


def measure_sensitivity(
    analyzer: SensitivityAnalyzer, progress: Progress | None = None
) -> Sensitivity:
    """Rank the layers, and measure keeping 0, 1, 2, 4, … of the worst in full precision."""
    progress = progress or NullProgress()
    layers = {}
    with progress.stage(
        f"{len(analyzer.layers)} layers, one at a time", len(analyzer.layers)
    ) as advance:
        for name in analyzer.layers:
            layers[name] = analyzer.measure_layer(name)
            advance(1)
    ranking = sorted(layers, key=lambda name: -_relative_l2(layers[name]))
    counts = [
        0,
        *(2**power for power in range(len(ranking).bit_length()) if 2**power < len(ranking)),
    ]
    kept = {}
    with progress.stage("keeping the worst", len(counts)) as advance:
        for count in counts:
            kept[count] = analyzer.measure_all_except(ranking[:count])
            advance(1)
    settings = analyzer.settings
    return Sensitivity(
        weights=analyzer.fingerprint,
        precision=analyzer.precision,
        steps=list(settings.steps),
        shape=[1, *settings.shape],
        seed=settings.seed,
        layers={name: layers[name] for name in ranking},
        excluded=analyzer.excluded,
        kept=kept,
    )


def select_full_precision_layers(
    sensitivity: Sensitivity,
    keep_layers: int | None = None,
    min_psnr_db: float | None = None,
    psnr: Callable[[Collection[str]], float] | None = None,
) -> list[str]:
    """Select the layers that stay in full precision.

    Args:
        sensitivity: the ranking.
        keep_layers: number of worst layers to keep.
        min_psnr_db: keep as few of the worst as a bisection finds to reach this PSNR with the rest
            quantized.
        psnr: returns the PSNR for a list of layers that are kept:
            `SensitivityAnalyzer.psnr_all_except`. Needed with `min_psnr_db`.

    Returns:
        Layer names, the worst first.

    Raises:
        AnyFlowError: both or neither of the two, more layers than there are, or a PSNR that only
            the unquantized network reaches.
    """
    ranking = list(sensitivity.layers)
    if (keep_layers is None) == (min_psnr_db is None):
        raise AnyFlowError(
            "give one of --keep-layers N and --min-psnr DB: a number of layers, or a PSNR to reach."
        )
    if keep_layers is not None:
        check_keep_layers(keep_layers, len(ranking))
        return ranking[:keep_layers]
    assert min_psnr_db is not None
    if psnr is None or not math.isfinite(min_psnr_db):
        raise AnyFlowError(
            f"--min-psnr is {min_psnr_db}; allowed is a number of decibels, measured with the"
            " model's weights."
        )
    if psnr([]) >= min_psnr_db:
        return []
    too_few = 0
    sufficient = len(ranking)
    while sufficient - too_few > 1:
        middle = (too_few + sufficient) // 2
        if psnr(ranking[:middle]) >= min_psnr_db:
            sufficient = middle
        else:
            too_few = middle
    if sufficient == len(ranking):
        raise AnyFlowError(
            f"{min_psnr_db:g} dB cannot be reached with any layer in {sensitivity.precision}. Give"
            " a lower --min-psnr, or choose fp16."
        )
    return ranking[:sufficient]


def check_keep_layers(keep_layers: int | None, layers: int) -> None:
    """Refuse a number of layers that leaves nothing to quantize; needs no measurement.

    Raises:
        AnyFlowError: `keep_layers` is below 0, or not below the number of layers.
    """
    if keep_layers is not None and not 0 <= keep_layers < layers:
        allowed = (
            f"0 to {layers - 1}, since {layers} layers can be quantized"
            if layers
            else "none: no layer can be quantized"
        )
        raise AnyFlowError(f"--keep-layers is {keep_layers}; allowed are {allowed}.")


def psnr_from_error(error: QuantizationError) -> float:
    """Return the PSNR in decibels: infinite for equal videos, -infinite for one not finite."""
    if error.relative_l2 is None:
        return -math.inf
    return math.inf if error.psnr_db is None else error.psnr_db


def _relative_l2(error: QuantizationError) -> float:
    return math.inf if error.relative_l2 is None else error.relative_l2


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def write_sensitivity(path: Path | OutputFile, sensitivity: Sensitivity) -> None:
    """Write a `sensitivity.json`, whole or not at all."""
    write_text_atomically(path, sensitivity.to_text())


def load_sensitivity(path: Path) -> Sensitivity:
    """Read a `sensitivity.json`.

    Raises:
        AnyFlowError: not there, not such a file, or of another schema.
    """
    return load_record(path, Sensitivity, 1, "anyflow-sensitivity BUNDLE")
