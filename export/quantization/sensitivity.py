"""Which layers suffer most from 8 bits, and which to keep high: measured on the model at hand.

Each layer is quantized alone, videos are made at a few step counts, and compared with those of the
untouched network from the same noise: that ranks the layers. Damages do not add up (errors of one
layer hide or feed those of another), so how many have to stay high is not read off the ranking but
measured again: `select_full_precision_layers` quantizes all but the n worst, makes the videos, and
bisects n.

Lists of layers made for another model are worth nothing: they depend on depth, and on the weights.
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
    """What quantizing some layers does to a video, at the step count where it is worst.

    Attributes:
        relative_l2: |quantized - untouched| / |untouched|; None where the video is not finite any
            more.
        psnr_db: peak signal to noise; None where the two are equal.
    """

    relative_l2: float | None
    psnr_db: float | None


class Sensitivity(FrozenRecord):
    """`sensitivity.json`.

    Attributes:
        weights: their fingerprint.
        precision: what layers were quantized to.
        steps, shape, seed: of the videos.
        layers: layer -> what quantizing it alone does, the worst first.
        excluded: candidates that cannot be quantized -> why.
        kept: number of worst layers kept high -> what quantizing all others does.
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
    """The videos that are compared.

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
    """Makes videos with some layers quantized, and measures them against those of the untouched
    network.

    Args:
        weights: of the model.
        calibration: of the same weights.
        precision: "int8" or "fp8".
        settings: see `SensitivitySettings`.
        smooth: SmoothQuant's factors, see `FakeQuant`.

    Attributes:
        layers: those that can be quantized.
        excluded: the others -> why.
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
        """Quantize one layer."""
        self._fake_quant.quantize_only([layer])
        return self._measure_error()

    def measure_all_except(self, kept: Collection[str]) -> QuantizationError:
        """Quantize all layers but these."""
        self._fake_quant.keep_layers(kept)
        return self._measure_error()

    def psnr_all_except(self, kept: Collection[str]) -> float:
        """The same in decibels: infinite for equal videos, minus infinite for one that is not
        finite."""
        return psnr_from_error(self.measure_all_except(kept))

    def _generate_videos(self) -> list[Array]:
        return [
            run_rollout(self._engine, self._noise, self.settings.text, schedule)
            for schedule in self._schedules
        ]

    def _measure_error(self) -> QuantizationError:
        found = [
            difference(*pair) for pair in zip(self._generate_videos(), self._reference, strict=True)
        ]
        worst: Difference = max(found, key=lambda d: d.relative_l2)
        return QuantizationError(
            relative_l2=_finite(worst.relative_l2), psnr_db=_finite(min(d.psnr_db for d in found))
        )


def measure_sensitivity(
    analyzer: SensitivityAnalyzer, progress: Progress | None = None
) -> Sensitivity:
    """Rank the layers, and measure keeping 0, 1, 2, 4, … of the worst."""
    progress, layers = progress or NullProgress(), {}
    with progress.stage(
        f"{len(analyzer.layers)} layers, one at a time", len(analyzer.layers)
    ) as advance:
        for name in analyzer.layers:
            layers[name] = analyzer.measure_layer(name)
            advance(1)
    ranked = sorted(layers, key=lambda name: -_relative_l2(layers[name]))
    counts = [0, *(2**power for power in range(len(ranked).bit_length()) if 2**power < len(ranked))]
    kept = {}
    with progress.stage("keeping the worst", len(counts)) as advance:
        for count in counts:
            kept[count] = analyzer.measure_all_except(ranked[:count])
            advance(1)
    settings = analyzer.settings
    return Sensitivity(
        weights=analyzer.fingerprint,
        precision=analyzer.precision,
        steps=list(settings.steps),
        shape=[1, *settings.shape],
        seed=settings.seed,
        layers={name: layers[name] for name in ranked},
        excluded=analyzer.excluded,
        kept=kept,
    )


def select_full_precision_layers(
    sensitivity: Sensitivity,
    keep_layers: int | None = None,
    min_psnr_db: float | None = None,
    psnr: Callable[[Collection[str]], float] | None = None,
) -> list[str]:
    """Choose the layers that stay high.

    Args:
        sensitivity: the ranking.
        keep_layers: so many of the worst.
        min_psnr_db: as few of the worst as a bisection finds to reach this PSNR with the rest
            quantized.
        psnr: measures that, given the layers kept: `SensitivityAnalyzer.psnr_all_except`. Needed
            with `min_psnr_db`.

    Returns:
        Layer names, the worst first.

    Raises:
        AnyFlowError: both or neither of the two, a number there are not so many layers for, or a
            fidelity that only the unquantized network has.
    """
    ranked = list(sensitivity.layers)
    if (keep_layers is None) == (min_psnr_db is None):
        raise AnyFlowError(
            "give one of --keep-layers N and --min-psnr DB: a number of layers, or a PSNR to reach."
        )
    if keep_layers is not None:
        check_keep_layers(keep_layers, len(ranked))
        return ranked[:keep_layers]
    assert min_psnr_db is not None
    if psnr is None or not math.isfinite(min_psnr_db):
        raise AnyFlowError(
            f"--min-psnr is {min_psnr_db}; allowed is a number of decibels, measured with the"
            " model's weights."
        )
    if psnr([]) >= min_psnr_db:
        return []
    short, enough = 0, len(ranked)
    while enough - short > 1:
        middle = (short + enough) // 2
        if psnr(ranked[:middle]) >= min_psnr_db:
            enough = middle
        else:
            short = middle
    if enough == len(ranked):
        raise AnyFlowError(
            f"{min_psnr_db:g} dB cannot be reached with any layer in {sensitivity.precision}. Ask"
            " for less, or choose fp16."
        )
    return ranked[:enough]


def check_keep_layers(keep_layers: int | None, layers: int) -> None:
    """Refuse a number of layers that leaves nothing to quantize; cheap, so ask before measuring.

    Raises:
        AnyFlowError: `keep` is not from 0 to one less than there are.
    """
    if keep_layers is not None and not 0 <= keep_layers < layers:
        allowed = (
            f"0 to {layers - 1}, since {layers} layers can be quantized"
            if layers
            else "none: no layer can be quantized"
        )
        raise AnyFlowError(f"--keep-layers is {keep_layers}; allowed are {allowed}.")


def psnr_from_error(error: QuantizationError) -> float:
    """PSNR as a number that compares."""
    if error.relative_l2 is None:
        return -math.inf
    return math.inf if error.psnr_db is None else error.psnr_db


def _relative_l2(error: QuantizationError) -> float:
    return math.inf if error.relative_l2 is None else error.relative_l2


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def write_sensitivity(path: Path, sensitivity: Sensitivity) -> None:
    """Write a `sensitivity.json`, whole or not at all."""
    write_text_atomically(path, sensitivity.to_text())


def load_sensitivity(path: Path) -> Sensitivity:
    """Read a `sensitivity.json`.

    Raises:
        AnyFlowError: not there, not such a file, or of another schema.
    """
    return load_record(path, Sensitivity, 1, "anyflow-sensitivity BUNDLE")
