"""What the hardware allows, and how near a transition comes.

A transition takes at least its operations over the rate of the units that do them, and at least its
bytes over the memory's rate; the larger of the two is the bound (Williams, Waterman and Patterson,
2009). On a GPU the rates are those of the target table, from data sheets. A processor has no row
there, since "cpu" is any: its rates are measured, through ONNX Runtime, with the threads that the
engine has: one large matrix product of each type, and one addition of arrays that no cache holds.
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
"""Tries of each at least, and how long to go on: on a machine with neighbours the best of a moment
is no ceiling."""


def roofline(cost: ComputeCost, ceilings: Ceilings, median: float | None) -> Roofline:
    """One transition against the ceilings.

    Args:
        work: of one transition.
        ceilings: types that are missing there are counted at float32's rate.
        median: seconds measured; None for an estimate.

    Raises:
        MeasurementUnavailableError: the ceilings lack a type that the work needs.
    """
    seconds = 0.0
    for kind, count in cost.operations.items():
        rate = ceilings.operations.get(kind)
        if not rate:
            raise MeasurementUnavailableError(
                f"{ceilings.name} has no rate for {kind} ({ceilings.source})"
            )
        seconds += count / rate
    moving = cost.bytes / ceilings.bandwidth
    efficiency = None if median is None else max(seconds, moving) / median
    return Roofline(
        operations=cost.operations,
        bytes=cost.bytes,
        compute_seconds=seconds,
        memory_seconds=moving,
        efficiency=efficiency,
    )


def ceilings_from_target(target: Target) -> Ceilings:
    """From the table.

    Raises:
        AnyFlowError: a row without numbers: the CPU, which is measured where it runs.
    """
    if target.bandwidth is None:
        able = ", ".join(name for name, row in TARGETS.items() if row.bandwidth is not None)
        raise AnyFlowError(
            f"target {target.name!r} is any processor and has no data sheet; its rates are measured"
            f" when a bundle is profiled on it. Choose one of {able}."
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
"""A card whose name goes on like this is slower or faster than the one in the table."""


def target_from_gpu_name(name: str) -> Target | None:
    """The table's row for a GPU's name as its driver gives it, such as "NVIDIA H100 80GB HBM3";
    None where none fits.

    On a Jetson it is the board's name, such as "NVIDIA Jetson Orin Nano Developer Kit": CUDA calls
    all of them "Orin".
    """
    words = {
        "orin-nano": r"\borin\s+nano\b",
        "orin-nx": r"\borin\s+nx\b",
        "orin": r"\borin\b",
        "thor": r"\bthor\b",
    }
    for row in sorted(TARGETS.values(), key=lambda row: -len(row.name)):
        pattern = words.get(row.name) or row.name.replace("rtx", r"rtx\s*").join((r"\b", r"\b"))
        pattern += _OTHER_CHIP if row.name.startswith("rtx") else ""
        if row.bandwidth is not None and re.search(pattern, name, re.IGNORECASE):
            return row
    return None


def measure_ceilings(threads: int | None, kinds: set[str], seconds: float = SECONDS) -> Ceilings:
    """This processor's, through ONNX Runtime.

    Args:
        threads: as the engine has; None for ONNX Runtime's own choice.
        kinds: types that the work is counted in. 16-bit floats and FP8 are computed in float32 on a
            CPU.
        seconds: for each rate.

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
    runtime = _OperatorBenchmark(onnx, onnxruntime, threads, seconds)
    float32 = runtime.product("MatMul", np.float32, np.float32)
    rates = dict.fromkeys(kinds | {"fp32"}, float32)
    if "int8" in kinds:
        weights = np.uint8 if saturates(onnxruntime) else np.int8  # as the engine multiplies here
        rates["int8"] = runtime.product("MatMulInteger", np.uint8, weights)
    return Ceilings(
        name="this processor",
        operations=rates,
        bandwidth=runtime.addition(),
        measured=True,
        source=f"measured through ONNX Runtime {onnxruntime.__version__}: the best of {seconds:g} s"
        f" of a product of {' x '.join(map(str, PRODUCT))},"
        f" and of an addition of three arrays of {4 * ARRAY >> 20} MiB",
    )


class _OperatorBenchmark:
    """Graphs of one operator, timed."""

    def __init__(self, onnx: Any, onnxruntime: Any, threads: int | None, budget: float) -> None:
        self._onnx = onnx
        self._runtime = onnxruntime
        self._budget = budget
        self._options = onnxruntime.SessionOptions()
        self._options.log_severity_level = 3
        if threads is not None:
            self._options.intra_op_num_threads = threads

    def product(self, operator: str, first: type, second: type) -> float:
        """Operations per second of the product; the second operand is a weight, which runtimes pack
        beforehand."""
        rows, inner, columns = PRODUCT
        random = np.random.default_rng(0)
        weight = (
            random.standard_normal((inner, columns))
            if second is np.float32
            else random.integers(-50, 50, (inner, columns))
        )
        given: Any = random.integers(0, 100, (rows, inner)).astype(first)
        return (
            2.0
            * rows
            * inner
            * columns
            / self._seconds(operator, {"a": given}, {"b": weight.astype(second)})
        )

    def addition(self) -> float:
        """Bytes per second of reading two arrays and writing a third."""
        array = np.ones(ARRAY, np.float32)
        return 3.0 * array.nbytes / self._seconds("Add", {"a": array, "b": array.copy()}, {})

    def _seconds(self, operator: str, inputs: dict[str, Any], weights: dict[str, Any]) -> float:
        """The best of several tries: a ceiling is what the machine can do, not what it did on
        average."""
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
        # Written again and again: no new pages are touched
        binding.bind_ortvalue_output("c", binding.get_outputs()[0])
        times: list[float] = []
        while len(times) < MIN_RUNS or sum(times) < self._budget:
            began = clock()
            session.run_with_iobinding(binding)
            times.append(clock() - began)
        return min(times)


def _with_output(binding: Any) -> Any:
    binding.bind_output("c", "cpu")
    return binding
