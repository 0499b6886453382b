"""Running a plan: execution contexts, and CUDA graphs of what is run again and again.

All contexts of one `ExecutionSlot` take turns on one CUDA stream, so they share one piece of
activation memory, given to them by us. The *general* context runs anything; its shapes and
addresses are set where they differ from the last call's. A call that comes back with the same
shapes and addresses gets a context of its own, in which both are set once, and after one warm-up
there it is captured: TensorRT leaves undefined what a graph does once its context was changed, so
that context is never touched again. Where the library captures by itself (TensorRT for RTX), such
a context is only run: it captures again whenever a shape or an address changes, and there none
does.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from contextlib import suppress
from dataclasses import dataclass, field

from anyflow_deploy.engines.tensorrt.api import trt
from anyflow_deploy.engines.tensorrt.build.optimization_profiles import Shape, select_profile
from anyflow_deploy.engines.tensorrt.cuda import CudaDevice, CudaGraph, DeviceBuffer
from anyflow_deploy.engines.tensorrt.plan import LoadedPlan
from anyflow_deploy.errors import BackendError

_log = logging.getLogger("anyflow_deploy.tensorrt")

GENERAL_RUNS = 2
"""Runs of a call before it gets a context of its own. A sample of a few steps on a cache that grows
never comes so far: capturing would cost it more than it saves. (Reasoned, not measured.)"""

KEPT_GRAPHS = 16
"""Calls that are remembered; the one not used for longest is dropped."""


@dataclass(frozen=True)
class CallKey:
    """What is run: the shape of every input and the device address of every tensor."""

    shapes: tuple[tuple[str, Shape], ...]
    addresses: tuple[tuple[str, int], ...]


@dataclass
class _GraphCacheEntry:
    """A call that came before."""

    runs: int = 0
    context: _ContextState | None = None
    graph: CudaGraph | None = None


@dataclass
class _ContextState:
    """A context and what is set in it.

    Attributes:
        plan: is given up after the context, which may refer to what it holds.
    """

    context: trt.IExecutionContext
    plan: LoadedPlan
    profile: int = -1
    shapes: dict[str, Shape] = field(default_factory=dict)
    addresses: dict[str, int] = field(default_factory=dict)
    needed: int = 0
    memory: tuple[int, int] = (0, 0)
    """Address and size: a larger piece may come to lie where the last one was."""


class ExecutionSlot:
    """A CUDA stream with the buffers and contexts that take turns on it. For one thread at a time.

    Args:
        device: the GPU.
        graphs: capture what is run again and again.
        profiler: told how long every layer takes; each run then waits for itself.
    """

    def __init__(
        self, device: CudaDevice, graphs: bool, profiler: trt.IProfiler | None = None
    ) -> None:
        self.device, self.stream = device, device.stream()
        self.profiler = profiler
        self._graphs = graphs
        self._free: dict[int, list[DeviceBuffer]] = {}
        self._activations = device.buffer(0)
        self._runners: dict[str, _Runner] = {}

    def run(self, plan: LoadedPlan, shapes: dict[str, Shape], addresses: dict[str, int]) -> None:
        """Put one run of a plan on the stream.

        Args:
            plan: what to run.
            shapes: of every input.
            addresses: on the device, of every input and output.

        Raises:
            ShapeError: no profile holds the shapes.
            BackendError: TensorRT refuses.
        """
        self.device.use()
        runner = self._runners.setdefault(plan.name, _Runner(plan, self, self._graphs))
        try:
            runner.run(CallKey(tuple(shapes.items()), tuple(addresses.items())))
        except BaseException:
            with suppress(BackendError):
                # what is on its way to the device for this run may go with the error
                self.stream.synchronize()
            raise

    def activations(self, size: int) -> DeviceBuffer:
        """Memory for contexts' activations, at least this much. Larger than before, it is another
        piece, and what was captured is dropped."""
        if size > self._activations.size:
            self.stream.synchronize()
            for runner in self._runners.values():
                runner.drop_graphs()
            old = self._activations
            self._activations = self.device.buffer(0)
            # first, to make room: and if there is none all the same, the next run begins with
            # nothing
            old.close()
            self._activations = self.device.buffer(size)
        return self._activations

    def acquire(self, size: int) -> DeviceBuffer:
        """A buffer; one that was given back, if it is of this size, so that addresses come back,
        too."""
        free = self._free.get(size)
        return free.pop() if free else self.device.buffer(size)

    def release(self, *buffers: DeviceBuffer) -> None:
        """Give buffers back to the slot."""
        for buffer in reversed(buffers):
            self._free.setdefault(buffer.size, []).append(buffer)

    def close(self) -> None:
        """Release everything."""
        self.device.use()
        self.stream.synchronize()
        for runner in self._runners.values():
            runner.drop_graphs()
        self._runners.clear()
        for buffers in self._free.values():
            for buffer in buffers:
                buffer.close()
        self._free.clear()
        self._activations.close()
        self.stream.close()


class _Runner:
    """One plan's contexts in one slot."""

    def __init__(self, plan: LoadedPlan, slot: ExecutionSlot, graphs: bool) -> None:
        self._plan, self._slot, self._graphs = plan, slot, graphs
        self._general: _ContextState | None = None
        self._entries: OrderedDict[CallKey, _GraphCacheEntry] = OrderedDict()

    def run(self, key: CallKey) -> None:
        profile = select_profile(self._plan.profiles, dict(key.shapes), self._plan.name)
        entry = self._entries.setdefault(key, _GraphCacheEntry())
        self._entries.move_to_end(key)
        entry.runs += 1
        if entry.graph is not None:
            entry.graph.launch()
        elif not self._graphs or entry.runs <= GENERAL_RUNS:
            self._enqueue(self._general_context(), key, profile)
        elif entry.context is None:
            entry.context = self._create_context(repeats=True)
            self._enqueue(entry.context, key, profile)
        elif self._plan.captures_runs:
            self._enqueue(entry.context, key, profile)
        else:
            entry.graph = self._capture_graph(entry.context, key, profile)
            if entry.graph is not None:
                entry.graph.launch()
            else:
                self._enqueue(self._general_context(), key, profile)
        self._entries[key] = entry  # making room for it may have dropped what was known
        self._trim()

    def drop_graphs(self) -> None:
        """Drop graphs and the contexts they were captured in; what was put on the stream has
        finished."""
        for entry in self._entries.values():
            if entry.graph is not None:
                entry.graph.close()
        self._entries.clear()

    def _trim(self) -> None:
        while len(self._entries) > KEPT_GRAPHS:
            _, oldest = self._entries.popitem(last=False)
            if oldest.context is not None:
                self._slot.stream.synchronize()
            if oldest.graph is not None:
                oldest.graph.close()

    def _general_context(self) -> _ContextState:
        if self._general is None:
            self._general = self._create_context(repeats=False)
        return self._general

    def _create_context(self, repeats: bool) -> _ContextState:
        context = self._plan.create_context(repeats)
        if context is None:
            raise self._plan.refusal("make an execution context")
        if self._slot.profiler is not None:
            # enqueue_emits_profile is on by default.
            context.profiler = self._slot.profiler
        return _ContextState(context, self._plan)

    def _capture_graph(self, state: _ContextState, key: CallKey, profile: int) -> CudaGraph | None:
        try:
            return self._slot.stream.capture(lambda: self._enqueue(state, key, profile))
        except BackendError as error:
            _log.warning("%s runs without CUDA graphs: %s", self._plan.name, error)
            self._graphs = False
            return None

    def _enqueue(self, state: _ContextState, key: CallKey, profile: int) -> None:
        """Set what differs from the last call, and run."""
        context, stream = state.context, self._slot.stream
        changed = profile != state.profile
        if changed:
            if not context.set_optimization_profile_async(profile, stream.handle):
                raise self._plan.refusal(f"change to profile {self._plan.profiles[profile].name!r}")
            state.profile = profile
            state.shapes.clear()
        for name, shape in key.shapes:
            if state.shapes.get(name) != shape:
                if not context.set_input_shape(name, shape):
                    raise self._plan.refusal(f"take {name} of shape {shape}")
                state.shapes[name], changed = shape, True
        for name, address in key.addresses:
            if state.addresses.get(name) != address:
                if not context.set_tensor_address(name, address):
                    raise self._plan.refusal(f"take an address for {name}")
                state.addresses[name] = address
        if changed:
            state.needed = context.update_device_memory_size_for_shapes()
        memory = self._slot.activations(state.needed)
        if changed or state.memory != (memory.address, memory.size):
            context.set_device_memory(memory.address, memory.size)
            state.memory = memory.address, memory.size
        if not context.execute_async_v3(stream.handle):
            raise self._plan.refusal("run")
