"""Judge from the probes' results which backend runs which precision here, and why not."""

from __future__ import annotations

from dataclasses import dataclass

from anyflow_deploy.doctor import probes
from anyflow_deploy.doctor.probe import MISSING, ProbeResult, ProbeResults
from anyflow_deploy.engines.registry import BACKENDS, Backend
from anyflow_deploy.engines.tensorrt_rtx.compute_capability import SUPPORTED_TEXT, is_supported
from anyflow_deploy.errors import AnyFlowError, suggestion
from anyflow_deploy.targets import CPU_HAS_NO_BF16

PRECISIONS = ("fp32", "fp16", "bf16", "int8", "fp8")
BASES = PRECISIONS[:3]

_CAPABILITY = {"bf16": (8, 0), "int8": (7, 5), "fp8": (8, 9)}
"""Compute capability of the first NVIDIA GPUs with units for a type."""

_OLDEST_FOR_TENSORRT = (7, 5)


@dataclass(frozen=True)
class BackendRequirements:
    """A backend on a provider.

    Attributes:
        name, provider: as `--backend` and `--provider` take them.
        needs: names of the probes that have to work.
        precisions: what it runs where everything is there.
    """

    name: str
    provider: str
    needs: tuple[str, ...]
    precisions: tuple[str, ...]


def _requirements(backend: Backend, provider: str) -> BackendRequirements:
    """Return what a row of the registry needs on a provider."""
    needs = (probes.NUMPY, *((probes.GPU,) if provider == "cuda" else ()), *backend.probes)
    needs += backend.gpu_probes if provider == "cuda" else ()
    return BackendRequirements(
        backend.name, provider, needs, PRECISIONS if backend.quantized else BASES
    )


REQUIREMENTS = tuple(
    _requirements(row, provider) for row in BACKENDS.values() for provider in row.packages
)
"""Every backend on every provider it has."""


@dataclass(frozen=True)
class BackendVerdict:
    """What a backend runs on this machine.

    Attributes:
        backend: the backend, on one provider.
        reasons: precision -> why it does not run; empty where it does.
    """

    backend: BackendRequirements
    reasons: dict[str, str]

    @property
    def runnable_precisions(self) -> list[str]:
        """The precisions that run."""
        return [name for name, reason in self.reasons.items() if not reason]


def judge_backends(results: ProbeResults) -> list[BackendVerdict]:
    """Judge every backend on every provider it has.

    Args:
        results: of the probes, by name.
    """
    return [
        BackendVerdict(backend, {p: _reason(backend, p, results) for p in PRECISIONS})
        for backend in REQUIREMENTS
    ]


def check_requirement(
    requirement: str, provider: str | None, verdicts: list[BackendVerdict]
) -> str:
    """Check whether a backend, or one precision of it, runs.

    Args:
        requirement: `backend` (any precision) or `backend:precision`.
        provider: "cpu" or "cuda"; None: the CPU where the backend has one, else the GPU.
        verdicts: from `judge_backends`.

    Returns:
        Why it does not run; empty where it does.

    Raises:
        AnyFlowError: an unknown backend, provider or precision.
    """
    name, _, precision = requirement.partition(":")
    names = list(dict.fromkeys(verdict.backend.name for verdict in verdicts))
    if name not in names:
        raise AnyFlowError(
            f"--require names {name!r}; allowed are {', '.join(names)}.{suggestion(name, names)}"
        )
    if precision not in PRECISIONS and ":" in requirement:
        near = suggestion(precision, PRECISIONS)
        raise AnyFlowError(
            f"--require names precision {precision!r}; allowed are {', '.join(PRECISIONS)}.{near}"
        )
    rows = [
        v for v in verdicts if v.backend.name == name and provider in (None, v.backend.provider)
    ]
    if not rows:
        raise AnyFlowError(f"{name} has no provider {provider!r}; leave --provider out.")
    if precision:
        return rows[0].reasons[precision]
    return "" if rows[0].runnable_precisions else rows[0].reasons["fp32"]


def _reason(backend: BackendRequirements, precision: str, results: ProbeResults) -> str:
    for name in backend.needs:
        result = results.get(name, ProbeResult(MISSING, "was not probed"))
        if not result.works:
            return f"{name}: {result.detail}"
    if precision not in backend.precisions:
        return "this backend has no such precision"
    if backend.provider == "cpu":
        return _cpu_reason(backend, precision, results)
    if backend.name == "aotinductor" and not results[probes.TORCH].facts.get("cuda"):
        return f"{probes.TORCH}: {results[probes.TORCH].detail}"
    return _gpu_reason(
        backend, precision, tuple(results[probes.GPU].facts["gpus"][0]["compute_capability"])
    )


def _cpu_reason(backend: BackendRequirements, precision: str, results: ProbeResults) -> str:
    if backend.name != "onnxruntime":
        return ""
    if precision == "bf16":
        return CPU_HAS_NO_BF16
    result = results.get(probes.INT8, ProbeResult(MISSING, "was not probed"))
    return f"{probes.INT8}: {result.detail}" if precision == "int8" and not result.works else ""


def _gpu_reason(backend: BackendRequirements, precision: str, capability: tuple[int, ...]) -> str:
    text = ".".join(map(str, capability))
    if backend.name == "tensorrt-rtx" and not is_supported(capability):
        return (
            f"TensorRT for RTX needs compute capability {SUPPORTED_TEXT}, the first GPU has {text}"
        )
    if "tensorrt" in backend.name and capability < _OLDEST_FOR_TENSORRT:
        return f"TensorRT needs compute capability 7.5, the first GPU has {text}"
    minimum = _CAPABILITY.get(precision, (0, 0))
    return (
        f"needs compute capability {'.'.join(map(str, minimum))}, the first GPU has {text}"
        if capability < minimum
        else ""
    )
