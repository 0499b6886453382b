"""Compute what the hardware allows, and how near a transition comes to it.

A transition takes at least its operations over the rate of the units that do them, and at least its
bytes over the memory's rate; the larger of the two is the bound (Williams, Waterman and Patterson,
2009). On a GPU the rates are those of the target table, from data sheets. A processor has no row
there, since "cpu" is any processor: its rates are measured through ONNX Runtime, with the engine's
number of threads: one large matrix product of each type, and one addition of arrays that no cache
holds.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np

from anyflow_deploy.errors import AnyFlowError
from anyflow_deploy.profiling.errors import MeasurementUnavailableError
from anyflow_deploy.profiling.operations import ComputeCost
from anyflow_deploy.profiling.record import Ceilings, Roofline
from anyflow_deploy.profiling.timing import clock
from anyflow_deploy.targets import TARGETS, Target

PRODUCT = (2048, 1536, 4096)
"""Rows, inner and columns of the measured product: the shapes of a video model's linear layers."""

ARRAY = 16 << 20
"""Elements of each of three arrays, 64 MB in float32: more than a cache holds."""

MIN_RUNS, SECONDS = 5, 2.0
"""Least tries and seconds of each: on a shared machine, the best of a moment is no ceiling."""


def roofline(cost: ComputeCost, ceilings: Ceilings, median: float | None) -> Roofline:
    """Compare one transition with the ceilings.

    Args:
        cost: of one transition.
        ceilings: the hardware's highest rates.
        median: seconds measured; None for an estimate.

    Raises:
        MeasurementUnavailableError: the ceilings lack a type that the cost has.
    """
    compute_seconds = 0.0
    for kind, count in cost.operations.items():
        rate = ceilings.operations.get(kind)
        if not rate:
            raise MeasurementUnavailableError(
                f"{ceilings.name} has no rate for {kind} ({ceilings.source})"
            )
        compute_seconds += count / rate
    memory_seconds = cost.bytes / ceilings.bandwidth
    efficiency = None if median is None else max(compute_seconds, memory_seconds) / median
    return Roofline(
        operations=cost.operations,
        bytes=cost.bytes,
        compute_seconds=compute_seconds,
        memory_seconds=memory_seconds,
        efficiency=efficiency,
    )


def ceilings_from_target(target: Target) -> Ceilings:
    """Make ceilings from a row of the target table.

    Raises:
        AnyFlowError: a row without throughputs: the CPU, which is measured where it runs.
    """
    if target.bandwidth is None:
        names = ", ".join(name for name, row in TARGETS.items() if row.bandwidth is not None)
        raise AnyFlowError(
            f"target {target.name!r} is any processor and has no data sheet; its rates are measured"
            f" when a bundle is profiled on it. Choose one of {names}."
        )
    rates = {kind: 1e12 * value for kind, value in target.tflops.items() if kind != "tf32"}
    return Ceilings(
        name=target.device,
        operations=rates,
        bandwidth=target.bandwidth,
        source=f"{target.source} (dense)",
        measured=False,
    )


_OTHER_CHIP = r"(?!\s*(ti|super|d|laptop)\b)"
"""A card whose name continues like this is slower or faster than the one in the table."""


def target_from_gpu_name(name: str) -> Target | None:
    """Find the table's row of a GPU by its driver's name for it; None where none fits.

    Such a name is "NVIDIA H100 80GB HBM3".

    On a Jetson it is the board's name, such as "NVIDIA Jetson Orin Nano Developer Kit": CUDA calls
    all of them "Orin".
    """
    patterns = {
        "orin-nano": r"\borin\s+nano\b",
        "orin-nx": r"\borin\s+nx\b",
        "orin": r"\borin\b",
        "thor": r"\bthor\b",
    }
    for row in sorted(TARGETS.values(), key=lambda row: -len(row.name)):
        pattern = patterns.get(row.name) or row.name.replace("rtx", r"rtx\s*").join((r"\b", r"\b"))
        pattern += _OTHER_CHIP if row.name.startswith("rtx") else ""
        if row.bandwidth is not None and re.search(pattern, name, re.IGNORECASE):
            return row
    return None


def measure_ceilings(threads: int | None, kinds: set[str], seconds: float = SECONDS) -> Ceilings:
    """Measure this processor's ceilings through ONNX Runtime.

    Args:
        threads: the engine's number of threads; None for ONNX Runtime's own choice.
        kinds: types of the products. A CPU computes 16-bit floats and FP8 in float32.
        seconds: time for each rate.

    Raises:
        MeasurementUnavailableError: ONNX Runtime or onnx is not installed.
    """
    try:
        import onnx
        import onnxruntime

        from anyflow_deploy.engines.onnxruntime.int8 import saturates
    except ImportError as error:
        raise MeasurementUnavailableError(
            f"a processor's rates are measured through ONNX Runtime, and {error.name} is not"
            " installed (pip install 'anyflow-deploy[cpu]'); --target NAME compares with a row of"
            " the table instead"
        ) from None
    benchmark = _OperatorBenchmark(onnx, onnxruntime, threads, seconds)
    float32 = benchmark.measure_product("MatMul", np.float32, np.float32)
    rates = dict.fromkeys(kinds | {"fp32"}, float32)
    if "int8" in kinds:
        weights = np.uint8 if saturates(onnxruntime) else np.int8  # as the engine multiplies here
        rates["int8"] = benchmark.measure_product("MatMulInteger", np.uint8, weights)
    return Ceilings(
        name="this processor",
        operations=rates,
        bandwidth=benchmark.measure_addition(),
        measured=True,
        source=f"measured through ONNX Runtime {onnxruntime.__version__}: the best of {seconds:g} s"
        f" of a product of {' x '.join(map(str, PRODUCT))},"
        f" and of an addition of three arrays of {4 * ARRAY >> 20} MiB",
    )


class _OperatorBenchmark:
    """Times graphs of one operator."""

    def __init__(self, onnx: Any, onnxruntime: Any, threads: int | None, budget: float) -> None:
        self._onnx = onnx
        self._runtime = onnxruntime
        self._budget = budget
        self._options = onnxruntime.SessionOptions()
        self._options.log_severity_level = 3
        if threads is not None:
            self._options.intra_op_num_threads = threads

    def measure_product(self, operator: str, first: type, second: type) -> float:
        """Return the operations per second of a product.

        The second operand is a weight, which runtimes pack beforehand.
        """
        rows, inner, columns = PRODUCT
        random = np.random.default_rng(0)
        weight = (
            random.standard_normal((inner, columns))
            if second is np.float32
            else random.integers(-50, 50, (inner, columns))
        )
        operand: Any = random.integers(0, 100, (rows, inner)).astype(first)
        return (
            2.0
            * rows
            * inner
            * columns
            / self._best_seconds(operator, {"a": operand}, {"b": weight.astype(second)})
        )

    def measure_addition(self) -> float:
        """Return the bytes per second of reading two arrays and writing a third."""
        array = np.ones(ARRAY, np.float32)
        return 3.0 * array.nbytes / self._best_seconds("Add", {"a": array, "b": array.copy()}, {})

    def _best_seconds(
        self, operator: str, inputs: dict[str, Any], weights: dict[str, Any]
    ) -> float:
        """Return the best of several tries, since a ceiling is the best that is possible."""
        onnx, make = self._onnx, self._onnx.helper
        kind = make.np_dtype_to_tensor_dtype
        result = onnx.TensorProto.INT32 if operator == "MatMulInteger" else onnx.TensorProto.FLOAT
        graph = make.make_graph(
            [make.make_node(operator, [*inputs, *weights], ["c"])],
            "ceiling",
            [
                make.make_tensor_value_info(name, kind(value.dtype), value.shape)
                for name, value in inputs.items()
            ],
            [make.make_tensor_value_info("c", result, None)],
            [onnx.numpy_helper.from_array(value, name) for name, value in weights.items()],
        )
        model = make.make_model(graph, opset_imports=[make.make_opsetid("", 20)], ir_version=9)
        session = self._runtime.InferenceSession(
            model.SerializeToString(), self._options, providers=["CPUExecutionProvider"]
        )
        binding = session.io_binding()
        for name, value in inputs.items():
            binding.bind_cpu_input(name, value)
        session.run_with_iobinding(_with_output(binding))
        # The same output is written again, so that no new pages are touched.
        binding.bind_ortvalue_output("c", binding.get_outputs()[0])
        times: list[float] = []
        while len(times) < MIN_RUNS or sum(times) < self._budget:
            start = clock()
            session.run_with_iobinding(binding)
            times.append(clock() - start)
        return min(times)


def _with_output(binding: Any) -> Any:
    binding.bind_output("c", "cpu")
    return binding
