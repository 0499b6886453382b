"""Which backend runs which precision here, and why not: judged from the findings, with nothing
looked at anew."""

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
"""The first NVIDIA GPUs with units for a type."""

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
    """What a row of the registry needs on a provider."""
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
    """A backend here: each precision with the reason why it does not run, or an empty one where it
    does."""

    backend: BackendRequirements
    reasons: dict[str, str]

    @property
    def running(self) -> list[str]:
        """The precisions that run."""
        return [name for name, reason in self.reasons.items() if not reason]


def judge_backends(found: ProbeResults) -> list[BackendVerdict]:
    """Judge every backend.

    Args:
        found: what the probes said.
    """
    return [
        BackendVerdict(backend, {p: _reason(backend, p, found) for p in PRECISIONS})
        for backend in REQUIREMENTS
    ]


def check_requirement(wish: str, provider: str | None, verdicts: list[BackendVerdict]) -> str:
    """Whether a backend, or one precision of it, runs.

    Args:
        wish: `backend` (any precision) or `backend:precision`.
        provider: "cpu" or "cuda"; None: the CPU where the backend has one, else the GPU.
        verdicts: from `judge_backends`.

    Returns:
        Why it does not run; empty where it does.

    Raises:
        AnyFlowError: an unknown backend, provider or precision.
    """
    name, _, precision = wish.partition(":")
    names = list(dict.fromkeys(verdict.backend.name for verdict in verdicts))
    if name not in names:
        raise AnyFlowError(
            f"--require names {name!r}; allowed are {', '.join(names)}.{suggestion(name, names)}"
        )
    if precision not in PRECISIONS and ":" in wish:
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
    return "" if rows[0].running else rows[0].reasons["fp32"]


def _reason(backend: BackendRequirements, precision: str, found: ProbeResults) -> str:
    for name in backend.needs:
        finding = found.get(name, ProbeResult(MISSING, "not looked at"))
        if not finding.works:
            return f"{name}: {finding.detail}"
    if precision not in backend.precisions:
        return "this backend has no such precision"
    if backend.provider == "cpu":
        return _on_cpu(backend, precision, found)
    if backend.name == "aotinductor" and not found[probes.TORCH].facts.get("cuda"):
        return f"{probes.TORCH}: {found[probes.TORCH].detail}"
    return _on_gpu(
        backend, precision, tuple(found[probes.GPU].facts["gpus"][0]["compute_capability"])
    )


def _on_cpu(backend: BackendRequirements, precision: str, found: ProbeResults) -> str:
    if backend.name != "onnxruntime":
        return ""
    if precision == "bf16":
        return CPU_HAS_NO_BF16
    exact = found.get(probes.INT8, ProbeResult(MISSING, "not looked at"))
    return f"{probes.INT8}: {exact.detail}" if precision == "int8" and not exact.works else ""


def _on_gpu(backend: BackendRequirements, precision: str, has: tuple[int, ...]) -> str:
    shown = ".".join(map(str, has))
    if backend.name == "tensorrt-rtx" and not is_supported(has):
        return (
            f"TensorRT for RTX needs compute capability {SUPPORTED_TEXT}, the first GPU has {shown}"
        )
    if "tensorrt" in backend.name and has < _OLDEST_FOR_TENSORRT:
        return f"TensorRT needs compute capability 7.5, the first GPU has {shown}"
    needed = _CAPABILITY.get(precision, (0, 0))
    return (
        f"needs compute capability {'.'.join(map(str, needed))}, the first GPU has {shown}"
        if has < needed
        else ""
    )
