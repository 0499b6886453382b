"""The device under `gpu.py`: its clock, its memory, and what it can do at best."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from gpu_size import Size

from anyflow_deploy import Architecture

Work = Callable[[], Any]


class BenchmarkDevice:
    """The device: waits for it, and knows how much of its memory is taken."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.cuda = device.startswith("cuda")

    def wait(self) -> None:
        """Until everything queued is done."""
        if self.cuda:
            torch.cuda.synchronize()

    def used_bytes(self) -> int:
        """Bytes in use by anybody; 0 on the CPU, where benchmarks/memory.py measures processes."""
        if not self.cuda:
            return 0
        free, total = torch.cuda.mem_get_info()
        return total - free

    def release_memory(self) -> None:
        """Give back what nobody holds."""
        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()

    def seconds(self, work: Work) -> float:
        """Wall time of a piece of work, done."""
        self.wait()
        started = time.perf_counter()
        work()
        self.wait()
        return time.perf_counter() - started

    def describe(self) -> dict[str, Any]:
        """Name, driver's and CUDA's versions, clocks' neighbours."""
        if not self.cuda:
            return {"device": "cpu", "threads": torch.get_num_threads()}
        properties = torch.cuda.get_device_properties(0)
        return {
            "device": properties.name,
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "compute_capability": f"{properties.major}.{properties.minor}",
            "cuda": torch.version.cuda,
        }


def milliseconds(values: list[float]) -> float:
    """The median."""
    return round(1e3 * statistics.median(values), 3)


def step_works(a: Architecture, size: Size, machine: BenchmarkDevice) -> dict[str, Work]:
    """The products and the attentions of one layer, with nothing between them."""
    from torch.nn.functional import linear, scaled_dot_product_attention

    d, words, tokens = a.inner_dim, size.text[1], size.tokens
    make = lambda *shape: torch.randn(*shape, device=machine.device, dtype=torch.bfloat16)  # noqa: E731
    shapes = (
        [(tokens, d, d)] * 6
        + [(words, d, d)] * 2
        + [(tokens, d, a.ffn_dim), (tokens, a.ffn_dim, d)]
    )
    pairs = {shape: (make(shape[0], shape[1]), make(shape[2], shape[1])) for shape in set(shapes)}
    heads = (1, a.num_attention_heads)
    video = make(*heads, tokens, a.attention_head_dim)
    text = make(*heads, words, a.attention_head_dim)

    def products() -> None:
        for shape in shapes:
            linear(*pairs[shape])

    def attentions() -> None:
        scaled_dot_product_attention(video, video, video)
        scaled_dot_product_attention(video, text, text)

    return {"products": products, "attentions": attentions}


def peak_works(size: Size, machine: BenchmarkDevice) -> dict[str, Work]:
    """One large product, and one copy."""
    side, elements = size.peak
    square = torch.randn(side, side, device=machine.device, dtype=torch.bfloat16)
    source = torch.randn(elements, device=machine.device, dtype=torch.bfloat16)
    target = torch.randn(elements, device=machine.device, dtype=torch.bfloat16)
    return {"square": lambda: square @ square, "copy": lambda: target.copy_(source)}


def floor_seconds(
    a: Architecture, size: Size, machine: BenchmarkDevice, rounds: int
) -> dict[str, float]:
    """The products and attentions of one step with nothing between them, one layer timed and
    multiplied; and the peaks."""
    works = {**step_works(a, size, machine), **peak_works(size, machine)}
    found = {}
    with torch.no_grad():
        for name, work in works.items():
            machine.seconds(work)
            found[name] = statistics.median(machine.seconds(work) for _ in range(rounds))
    side, elements = size.peak
    return {
        "products_ms_per_step": round(1e3 * found["products"] * a.num_layers, 3),
        "attentions_ms_per_step": round(1e3 * found["attentions"] * a.num_layers, 3),
        "large_product_tflops": round(2 * side**3 / found["square"] / 1e12, 1),
        "copy_gb_per_second": round(2 * 2 * elements / found["copy"] / 1e9, 1),
    }
