"""Running a plan: execution contexts, and CUDA graphs of what is run again and again.

All contexts of one `Lane` take turns on one CUDA stream, so they share one piece of activation memory, given to them by
us. The *general* context runs anything; its shapes and addresses are set where they differ from the last call's. A call
that comes back with the same shapes and addresses gets a context of its own, in which both are set once, and after one
warm-up there it is captured: TensorRT leaves undefined what a graph does once its context was changed, so that context is
never touched again.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from contextlib import suppress
from dataclasses import dataclass, field

from anyflow_deploy.engines.tensorrt.api import VERSION, trt
from anyflow_deploy.engines.tensorrt.build.optimization_profiles import Shape, chosen
from anyflow_deploy.engines.tensorrt.cuda import Buffer, Device, Graph
from anyflow_deploy.engines.tensorrt.plan import Plan
from anyflow_deploy.errors import BackendError

_log = logging.getLogger("anyflow_deploy.tensorrt")

GENERAL_RUNS = 2
"""Runs of a call before it gets a context of its own. A sample of a few steps on a cache that grows never comes so far:
capturing would cost it more than it saves. (Reasoned, not measured.)"""

KEPT_GRAPHS = 16
"""Calls that are remembered; the one not used for longest is dropped."""


@dataclass(frozen=True)
class Call:
    """What is run: the shape of every input and the device address of every tensor."""

    shapes: tuple[tuple[str, Shape], ...]
    addresses: tuple[tuple[str, int], ...]


@dataclass
class _Known:
    """A call that came before."""

    runs: int = 0
    context: _Bound | None = None
    graph: Graph | None = None


@dataclass
class _Bound:
    """A context and what is set in it."""

    context: trt.IExecutionContext
    profile: int = -1
    shapes: dict[str, Shape] = field(default_factory=dict)
    addresses: dict[str, int] = field(default_factory=dict)
    needed: int = 0
    memory: tuple[int, int] = (0, 0)
    """Address and size: a larger piece may come to lie where the last one was."""


class Lane:
    """A CUDA stream with the buffers and contexts that take turns on it. For one thread at a time.

    Args:
        device: the GPU.
        graphs: capture what is run again and again.
        profiler: told how long every layer takes; each run then waits for itself.
    """

    def __init__(self, device: Device, graphs: bool, profiler: trt.IProfiler | None = None) -> None:
        self.device, self.queue = device, device.queue()
        self.profiler = profiler
        self._graphs = graphs
        self._free: dict[int, list[Buffer]] = {}
        self._activations = device.buffer(0)
        self._runners: dict[str, _Runner] = {}

    def run(self, plan: Plan, shapes: dict[str, Shape], addresses: dict[str, int]) -> None:
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
            runner.run(Call(tuple(shapes.items()), tuple(addresses.items())))
        except BaseException:
            with suppress(BackendError):
                self.queue.wait()  # what is on its way to the device for this run may go with the error
            raise

    def activations(self, size: int) -> Buffer:
        """Memory for contexts' activations, at least this much. Larger than before, it is another piece, and what was
        captured is dropped."""
        if size > self._activations.size:
            self.queue.wait()
            for runner in self._runners.values():
                runner.forget()
            old, self._activations = self._activations, self.device.buffer(0)
            old.close()  # first, to make room: and if there is none all the same, the next run begins with nothing
            self._activations = self.device.buffer(size)
        return self._activations

    def take(self, size: int) -> Buffer:
        """A buffer; one that was given back, if it is of this size, so that addresses come back, too."""
        free = self._free.get(size)
        return free.pop() if free else self.device.buffer(size)

    def give(self, *buffers: Buffer) -> None:
        """Give buffers back to the lane."""
        for buffer in reversed(buffers):
            self._free.setdefault(buffer.size, []).append(buffer)

    def close(self) -> None:
        """Release everything."""
        self.device.use()
        self.queue.wait()
        for runner in self._runners.values():
            runner.forget()
        self._runners.clear()
        for buffers in self._free.values():
            for buffer in buffers:
                buffer.close()
        self._free.clear()
        self._activations.close()
        self.queue.close()


class _Runner:
    """One plan's contexts in one lane."""

    def __init__(self, plan: Plan, lane: Lane, graphs: bool) -> None:
        self._plan, self._lane, self._graphs = plan, lane, graphs
        self._general: _Bound | None = None
        self._known: OrderedDict[Call, _Known] = OrderedDict()

    def run(self, call: Call) -> None:
        profile = chosen(self._plan.profiles, dict(call.shapes), self._plan.name)
        known = self._known.setdefault(call, _Known())
        self._known.move_to_end(call)
        known.runs += 1
        if known.graph is not None:
            known.graph.launch()
        elif not self._graphs or known.runs <= GENERAL_RUNS:
            self._general = self._general or self._bound()
            self._enqueue(self._general, call, profile)
        elif known.context is None:
            known.context = self._bound()
            self._enqueue(known.context, call, profile)
        else:
            known.graph = self._captured(known.context, call, profile)
            if known.graph is not None:
                known.graph.launch()
            else:
                self._general = self._general or self._bound()
                self._enqueue(self._general, call, profile)
        self._known[call] = known  # making room for it may have dropped what was known
        self._trim()

    def forget(self) -> None:
        """Drop graphs and the contexts they were captured in; what was put on the stream has finished."""
        for known in self._known.values():
            if known.graph is not None:
                known.graph.close()
        self._known.clear()

    def _trim(self) -> None:
        while len(self._known) > KEPT_GRAPHS:
            _, oldest = self._known.popitem(last=False)
            if oldest.context is not None:
                self._lane.queue.wait()
            if oldest.graph is not None:
                oldest.graph.close()

    def _bound(self) -> _Bound:
        context = self._plan.engine.create_execution_context(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        if context is None:
            raise self._refused("make an execution context")
        if self._lane.profiler is not None:
            context.profiler = self._lane.profiler  # enqueue_emits_profile is on unless switched off
        return _Bound(context)

    def _captured(self, bound: _Bound, call: Call, profile: int) -> Graph | None:
        try:
            return self._lane.queue.captured(lambda: self._enqueue(bound, call, profile))
        except BackendError as error:
            _log.warning("%s runs without CUDA graphs: %s", self._plan.name, error)
            self._graphs = False
            return None

    def _enqueue(self, bound: _Bound, call: Call, profile: int) -> None:
        """Set what differs from the last call, and run."""
        context, queue = bound.context, self._lane.queue
        changed = profile != bound.profile
        if changed:
            if not context.set_optimization_profile_async(profile, queue.handle):
                raise self._refused(f"change to profile {self._plan.profiles[profile].name!r}")
            bound.profile = profile
            bound.shapes.clear()
        for name, shape in call.shapes:
            if bound.shapes.get(name) != shape:
                if not context.set_input_shape(name, shape):
                    raise self._refused(f"take {name} of shape {shape}")
                bound.shapes[name], changed = shape, True
        for name, address in call.addresses:
            if bound.addresses.get(name) != address:
                if not context.set_tensor_address(name, address):
                    raise self._refused(f"take an address for {name}")
                bound.addresses[name] = address
        if changed:
            bound.needed = context.update_device_memory_size_for_shapes()
        memory = self._lane.activations(bound.needed)
        if changed or bound.memory != (memory.address, memory.size):
            context.set_device_memory(memory.address, memory.size)
            bound.memory = memory.address, memory.size
        if not context.execute_async_v3(queue.handle):
            raise self._refused("run")

    def _refused(self, what: str) -> BackendError:
        return BackendError(f"TensorRT {VERSION}: {self._plan.name!r} could not {what}: {self._plan.messages.summary()}.")
