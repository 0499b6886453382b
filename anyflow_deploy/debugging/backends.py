"""The two sides of a comparison, each as a graph and a Polygraphy runner of it.

The reference is computed by ONNX Runtime on the processor, operator by operator as the file says.
A candidate is what a backend really runs: of ONNX Runtime the graph as our engine rewrites it, with
its session options; of TensorRT and TensorRT for RTX the bundle's graph, parsed and built by
Polygraphy's loaders as our builder does it (strongly typed, no TF32), for the shapes at hand.
"""

from __future__ import annotations

import importlib
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import onnx
from onnx import ModelProto

from anyflow_deploy.bundle.bundle import Bundle
from anyflow_deploy.bundle.manifest import WEIGHTS
from anyflow_deploy.debugging.inputs import Feed
from anyflow_deploy.debugging.polygraphy_setup import RTX
from anyflow_deploy.debugging.reference_graph import widen_graph
from anyflow_deploy.engines.engine import Array
from anyflow_deploy.engines.onnxruntime.engine import OnnxRuntimeEngine
from anyflow_deploy.engines.registry import BACKENDS, EngineOptions
from anyflow_deploy.engines.tensorrt.library import LIBRARIES
from anyflow_deploy.errors import UnavailableError, reraise_interrupt


class GraphSide(Protocol):
    """One side of a comparison.

    Attributes:
        model: the graph, without its weights.
    """

    model: ModelProto

    @property
    def description(self) -> str:
        """Name runtime, device and precision, for people and reports."""
        ...

    def runner(self, marked: ModelProto, feed: Feed) -> Any:
        """Make a Polygraphy runner of the graph with other outputs, for the shapes of a feed."""
        ...


def read_graph(bundle: Bundle, graph: str) -> ModelProto:
    """Read a bundle's graph, without its weights.

    Raises:
        BundleError: it refers to a file that the manifest does not list.
    """
    path = bundle.file(bundle.manifest.graphs[graph].file)
    model = onnx.load(str(path), load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                bundle.file(entry.value)
    return model


class ReferenceSide:
    """A bundle's graph in float32 on the processor, without any optimization.

    Args:
        bundle: whose weights are right.
        graph: its name in the manifest.
        threads: CPU threads; None for as many as there are cores.
    """

    def __init__(self, bundle: Bundle, graph: str, threads: int | None = None) -> None:
        self._bundle, self._threads = bundle, threads
        self.model = widen_graph(read_graph(bundle, graph))
        self.description = (
            f"ONNX Runtime {_onnxruntime().__version__}, cpu, float32 from the weights of"
            f" {bundle.path.name} ({bundle.manifest.precision})"
        )

    def runner(self, marked: ModelProto, feed: Feed) -> Any:
        """Make a runner, as `GraphSide` says."""
        from polygraphy.backend.onnxrt import OnnxrtRunner

        return OnnxrtRunner(lambda: self._open_session(marked), name="reference")

    def run(self, graph: str, feed: Feed) -> dict[str, Array]:
        """Run one of the bundle's graphs, by its name; arrays that it does not take are ignored."""
        session = self._open_session(widen_graph(read_graph(self._bundle, graph)))
        names = [tensor.name for tensor in session.get_outputs()]
        wanted = {tensor.name for tensor in session.get_inputs()}
        answers = session.run(names, {n: a for n, a in feed.items() if n in wanted})
        return dict(zip(names, answers, strict=True))

    def _open_session(self, model: ModelProto) -> Any:
        runtime = _onnxruntime()
        options = runtime.SessionOptions()
        options.log_severity_level = 3
        options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.enable_mem_pattern = False
        if self._threads is not None:
            options.intra_op_num_threads = self._threads
        options.add_session_config_entry(
            "session.model_external_initializers_file_folder_path",
            str(self._bundle.path.resolve()),
        )
        return runtime.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )


class OnnxRuntimeSide(OnnxRuntimeEngine):
    """The ONNX Runtime backend: its own graph and session options, but other outputs.

    Args:
        bundle: what is debugged.
        graph: its name in the manifest.
        options: provider, device and threads.
    """

    def __init__(self, bundle: Bundle, graph: str, options: EngineOptions) -> None:
        super().__init__(bundle, options)
        self._graph, self._threads = graph, options.threads
        self.model = onnx.load_from_string(self._session_graph(graph))

    def _open_session(self, name: str, threads: int | None) -> Any:
        """Nothing yet: `runner` opens the one that is looked at."""

    def runner(self, marked: ModelProto, feed: Feed) -> Any:
        """Make a runner, as `GraphSide` says."""
        from polygraphy.backend.onnxrt import OnnxrtRunner

        graph = marked.SerializeToString()
        return OnnxrtRunner(
            lambda: self._session_from_graph(graph, self._graph, self._threads), name="candidate"
        )


class TensorRTSide:
    """TensorRT, or TensorRT for RTX.

    Args:
        bundle: what is debugged.
        graph: its name in the manifest.
        backend: "tensorrt" or "tensorrt-rtx".
        compute_capabilities: of TensorRT for RTX: what to build for; empty for the GPU at hand.

    Raises:
        UnavailableError: it is not installed.
    """

    def __init__(
        self,
        bundle: Bundle,
        graph: str,
        backend: str,
        compute_capabilities: Sequence[tuple[int, int]] = (),
    ) -> None:
        self._bundle, self._backend = bundle, backend
        self._capabilities = list(compute_capabilities)
        library = LIBRARIES[backend]
        self.model = read_graph(bundle, graph)
        try:
            self._trt: Any = importlib.import_module(library.module)
        except (ImportError, OSError) as error:
            reraise_interrupt(error)
            raise UnavailableError(
                f"{library.title} cannot be imported ({error}). {library.install_hint}"
                + BACKENDS[backend].install_command("cuda")
            ) from None
        version = self._trt.__version__
        self.description = f"{library.title} {version}, {bundle.manifest.precision}"

    def runner(self, marked: ModelProto, feed: Feed) -> Any:
        """Make a runner, as `GraphSide` says."""
        from polygraphy.backend.trt import EngineFromBytes, TrtRunner

        return TrtRunner(EngineFromBytes(lambda: self.build(marked, feed)), name="candidate")

    def build(self, marked: ModelProto, feed: Feed) -> Any:
        """Build a graph for the shapes of a feed, and return the serialized engine.

        TensorRT for RTX needs no GPU for it where compute capabilities are named.
        """
        from polygraphy.backend.trt import EngineBytesFromNetwork, NetworkFromOnnxPath

        with tempfile.TemporaryDirectory(prefix="anyflow-debug-") as folder:
            # The parser looks for weights beside the graph, and the bundle stays as it is
            path = Path(folder) / "marked.onnx"
            path.write_bytes(marked.SerializeToString())
            (Path(folder) / WEIGHTS).symlink_to(self._bundle.file(WEIGHTS).resolve())
            network = NetworkFromOnnxPath(str(path), strongly_typed=True)
            return EngineBytesFromNetwork(network, config=self._config(feed))()

    def _config(self, feed: Feed) -> Any:
        from polygraphy.backend.tensorrt_rtx import CreateConfigRTX
        from polygraphy.backend.trt import CreateConfig, Profile

        profile = Profile()
        for name, array in feed.items():
            profile.add(name, array.shape, array.shape, array.shape)
        if self._backend != RTX:
            return CreateConfig(profiles=[profile])  # clears TF32
        create = CreateConfigRTX(
            profiles=[profile],
            use_gpu=not self._capabilities,
            compute_capabilities=self._capabilities or None,
        )

        def config(builder: Any, network: Any) -> Any:
            made = create(builder, network)
            made.clear_flag(self._trt.BuilderFlag.TF32)  # float32 would keep 11 bits of mantissa
            return made

        return config


def _onnxruntime() -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        reraise_interrupt(error)
        raise UnavailableError(
            f"the reference runs in ONNX Runtime, which cannot be imported ({error}). Run: pip"
            " install 'anyflow-deploy[cpu]'"
        ) from None
    return onnxruntime
