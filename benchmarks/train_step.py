"""One training step: ours against a plain transcription of the algorithm on diffusers' modules.

    python benchmarks/train_step.py [--layers 4] [--rounds 3]
    python benchmarks/train_step.py --device cuda --compute bfloat16 --width 1.3b   # on a GPU

The same random weights, data, draws and losses; forward and backward of a flow-map step and of an
on-policy step, without the optimizer, float32, all weights trained, no gradient checkpointing. With
--compute bfloat16 our large products are made in that type, and the transcription runs under
torch.autocast. The transcription does what a reader of the paper would write: every forward by
itself, every sample in every forward, diffusers' per-token modulation. Both live in one process and
take turns; the ratio is the median of the rounds' ratios. Both gradients are compared: it is one
computation.

Activation memory is counted, not read from the system: the bytes of all distinct tensors that
autograd keeps for the backward pass of the forwards with gradient, without parameters. Products are
counted as well (`times_fewer_products`): where the processor does little but multiply, that is what
can be gained.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from common import gpu_name, print_result
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from anyflow_deploy.checkpoints.random_weights import RandomWeights
from anyflow_deploy.models import Architecture
from anyflow_deploy.training.chunks import ChunkPlan
from anyflow_deploy.training.losses import (
    DerivativeConfig,
    NoisePair,
    Score,
    dmd_gradient,
    dmd_losses,
    flow_map_losses,
    flow_matching_losses,
    rescale_losses,
)
from anyflow_deploy.training.model.network import TrainingTransformer
from anyflow_deploy.training.model.weight_init import build_network
from anyflow_deploy.training.rollout import rollout, shortcut
from anyflow_deploy.training.timestep_sampling import time_weight

SHAPE = (4, 3, 16, 16, 26)
GUIDANCE, SHIFT, STEP = 3.0, 5.0, 5.0
TIMES = torch.tensor([820.0, 610.0, 930.0, 740.0])
TARGETS = torch.tensor([820.0, 610.0, 0.0, 450.0])
PAIRS = shortcut(8, 3, SHIFT)


class DiffusersStep:
    """The algorithm on diffusers' AnyFlowTransformer3DModel."""

    def __init__(self, model: nn.Module, fake: nn.Module, real: nn.Module) -> None:
        self.model, self.fake, self.real = model, fake, real

    @staticmethod
    def u(model: nn.Module, z: Tensor, t: Tensor, r: Tensor, text: Tensor) -> Tensor:
        frames = z.shape[1]
        result: Tensor = model(
            z, t[:, None].expand(-1, frames), r[:, None].expand(-1, frames), text, return_dict=False
        )[0]
        return result

    def flow_map(self, pair: NoisePair) -> Tensor:
        t, r = TIMES, TARGETS
        s, far = (t / 1000).view(-1, 1, 1, 1, 1), STEP / 1000
        z = (1 - s) * pair.clean + s * pair.noise
        v = pair.noise - pair.clean
        with torch.no_grad():
            ahead = self.u(self.model, z + far * v, t + STEP, r, pair.text)
            behind = self.u(self.model, z - far * v, t - STEP, r, pair.text)
            without = self.u(self.model, z, t, r, pair.negative)
        change = (ahead - behind) / (2 * far) / GUIDANCE
        u = (self.u(self.model, z, t, r, pair.text) - (1 - GUIDANCE) * without) / GUIDANCE
        losses = (u - (v - (s - (r / 1000).view(-1, 1, 1, 1, 1)) * change)).square().flatten(
            1
        ).mean(1) * time_weight(t, SHIFT)
        same = t == r
        return torch.where(same, losses, losses * (losses[same].mean() / losses).detach()).mean()

    def roll_out(self, noise: Tensor, text: Tensor) -> Tensor:
        z = noise
        for t, r in PAIRS:
            z = z - (t - r) / 1000 * self.u(
                self.model, z, torch.full((len(z),), t), torch.full((len(z),), r), text
            )
        return z

    def on_policy(self, pair: NoisePair) -> None:
        t, s = TIMES, (TIMES / 1000).view(-1, 1, 1, 1, 1)
        x = self.roll_out(pair.noise, pair.text)
        with torch.no_grad():
            z = (1 - s) * x + s * pair.noise.flip(0)
            cond = z - s * self.u(self.real, z, t, t, pair.text)
            target = cond + GUIDANCE * (cond - (z - s * self.u(self.real, z, t, t, pair.negative)))
            fake = z - s * self.u(self.fake, z, t, t, pair.text)
            gradient = (fake - target) / (x - target).abs().flatten(1).mean(1).view(-1, 1, 1, 1, 1)
        (x - (x - gradient).detach()).square().mean().backward()
        self.flow_map(pair).backward()
        with torch.no_grad():
            x = self.roll_out(pair.noise.flip(1), pair.text)
        z = (1 - s) * x + s * pair.noise
        (self.u(self.fake, z, t, t, pair.text) - (pair.noise - x)).square().mean().backward()


class AnyFlowStep:
    """The same step as the trainer makes it."""

    def __init__(
        self,
        model: TrainingTransformer,
        fake: TrainingTransformer,
        real: TrainingTransformer,
        frames: int,
    ) -> None:
        self.model = model
        self.plan = ChunkPlan((frames,))
        self.fake = Score(fake, self.plan)
        self.real = Score(real, self.plan)

    def flow_map(self, pair: NoisePair) -> Tensor:
        losses = flow_map_losses(
            self.model, pair, TIMES, TARGETS, self.plan, GUIDANCE, SHIFT, DerivativeConfig()
        )
        same = TIMES == TARGETS
        return rescale_losses(losses, same, losses.detach()[same].mean()).mean()

    def roll_out(self, noise: Tensor, text: Tensor) -> Tensor:
        return rollout(self.model, noise, text, self.plan, PAIRS)

    def on_policy(self, pair: NoisePair) -> None:
        x = self.roll_out(pair.noise, pair.text)
        given = (x.detach(), pair.noise.flip(0), TIMES, pair)
        dmd_losses(
            x, dmd_gradient(self.real, self.fake, *given, GUIDANCE), self.plan.window
        ).mean().backward()
        self.flow_map(pair).backward()
        with torch.no_grad():
            x = self.roll_out(pair.noise.flip(1), pair.text)
        flow_matching_losses(
            self.fake.network, NoisePair(x, pair.noise, pair.text, pair.negative), TIMES, self.plan
        ).mean().backward()


@contextmanager
def saved_bytes(parameters: list[nn.Parameter]) -> Iterator[list[int]]:
    """Count what autograd keeps meanwhile: the sum comes out as the list's only entry."""
    own = {p.untyped_storage().data_ptr() for p in parameters}
    found: dict[int, int] = {}
    alive: list[Tensor] = []  # or a freed address would be counted as seen
    result: list[int] = []

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor.detach())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        yield result
    result.append(sum(found.values()))


def gradient(module: nn.Module) -> Tensor:
    return torch.cat(
        [p.grad.flatten() for _, p in sorted(module.named_parameters()) if p.grad is not None]
    )


def time_step(work: Callable[[], Any], modules: list[nn.Module], wait: Callable[[], None]) -> float:
    for module in modules:
        module.zero_grad()
    wait()
    started = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - started


def plain_networks(
    a: Architecture, drawn: list[dict[str, Tensor]], device: str, compute: str
) -> list[nn.Module]:
    """diffusers' transformers with these parameters, under autocast where `compute` is not
    float32."""
    from diffusers import AnyFlowTransformer3DModel

    modules = []
    for given in drawn:
        module = AnyFlowTransformer3DModel(
            **{k: v for k, v in a.as_config().items() if not k.startswith("_")}
        )
        module.load_state_dict(given)
        module.train().to(device)
        if compute != "float32":
            cast = torch.autocast(device, dtype=getattr(torch, compute))
            module.forward = cast(module.forward)  # type: ignore[method-assign]
        modules.append(module)
    return modules


def count_products(work: Callable[[], Any]) -> int:
    """Multiplications of all matrix products, attention's apart, which are few here; gradients are
    added to."""
    with FlopCounterMode(display=False) as counter:
        work()
    return int(counter.get_total_flops())


WIDTHS: dict[str, dict[str, Any]] = {
    "tiny": {"num_attention_heads": 2, "attention_head_dim": 32, "ffn_dim": 128, "text_dim": 64},
    "half": {"num_attention_heads": 6, "attention_head_dim": 128, "ffn_dim": 4480, "text_dim": 512},
    "1.3b": {
        "num_attention_heads": 12,
        "attention_head_dim": 128,
        "ffn_dim": 8960,
        "text_dim": 4096,
    },
}
LATENTS = {"tiny": (4, 3, 16, 8, 12), "half": SHAPE, "1.3b": (4, 6, 16, 32, 52)}


Sides = dict[str, Any]
"""Ours and diffusers' step."""
Modules = dict[str, list[nn.Module]]
"""The networks of each side: trained, fake score, real score."""


def build_sides(options: argparse.Namespace) -> tuple[Sides, Modules]:
    """Make both steps around the same three networks."""
    device = options.device
    a = Architecture(num_layers=options.layers, **WIDTHS[options.width])
    drawn = [RandomWeights(a, "bench", seed) for seed in (0, 1, 2)]
    tensors = [{name: weights.read(name) for name in weights.shapes()} for weights in drawn]
    compute = getattr(torch, options.compute)
    ours = [build_network(a, given, compute).to(device) for given in tensors]
    plain = plain_networks(a, tensors, device, options.compute)
    for module in (ours[2], plain[2]):
        module.requires_grad_(False)
    frames = LATENTS[options.width][1]
    sides = {"ours": AnyFlowStep(*ours, frames=frames), "diffusers": DiffusersStep(*plain)}
    return sides, {"ours": list(ours), "diffusers": list(plain)}


def draw_pair(options: argparse.Namespace) -> NoisePair:
    """Draw data, noise and text embeddings."""
    device, shape = options.device, LATENTS[options.width]
    text_dim = WIDTHS[options.width]["text_dim"]
    draw = torch.Generator().manual_seed(0)
    clean, noise = (torch.randn(shape, generator=draw).to(device) for _ in range(2))
    text, negative = (torch.randn(4, 64, text_dim, generator=draw).to(device) for _ in range(2))
    return NoisePair(clean, noise, text, negative)


def compare_steps(
    works: dict[str, Callable[[], Any]], modules: Modules, rounds: int, wait: Callable[[], None]
) -> dict[str, Any]:
    """Time one kind of step in turns, and compare gradients and products."""
    seconds: dict[str, list[float]] = {n: [] for n in works}
    for round_ in range(rounds + 1):  # the first warms up
        for n, work in works.items():
            spent = time_step(work, modules[n], wait)
            if round_:
                seconds[n].append(spent)
    first, second = (gradient(modules[n][0]) for n in works)
    products = {n: count_products(work) for n, work in works.items()}
    ratios = [b / x for x, b in zip(seconds["ours"], seconds["diffusers"], strict=True)]
    return {
        "ours_seconds": statistics.median(seconds["ours"]),
        "diffusers_seconds": statistics.median(seconds["diffusers"]),
        "times_as_fast": statistics.median(ratios),
        "by_round": [round(x, 2) for x in ratios],
        "times_fewer_products": products["diffusers"] / products["ours"],
        "gradient_distance": float((first - second).norm() / second.norm()),
    }


def compare_kept(works: dict[str, Callable[[], Any]], modules: Modules) -> dict[str, Any]:
    """Count what autograd keeps of a forward pass."""
    sizes = {}
    for n, work in works.items():
        with saved_bytes([p for m in modules[n] for p in m.parameters()]) as counted:
            work()
        sizes[n] = counted[0]
    return {
        **{f"{n}_mib": round(size / 2**20, 1) for n, size in sizes.items()},
        "share": sizes["ours"] / sizes["diffusers"],
    }


def compare_sides(options: argparse.Namespace) -> dict[str, Any]:
    """Make all comparisons."""
    sides, modules = build_sides(options)
    pair = draw_pair(options)
    cuda = options.device.startswith("cuda")
    wait = torch.cuda.synchronize if cuda else lambda: None
    forwards = {n: partial(side.flow_map, pair) for n, side in sides.items()}
    rollouts = {n: partial(side.roll_out, pair.noise, pair.text) for n, side in sides.items()}
    steps = {
        "flow_map": {n: lambda f=f: f().backward() for n, f in forwards.items()},
        "on_policy": {n: partial(side.on_policy, pair) for n, side in sides.items()},
    }
    results = {
        name: compare_steps(works, modules, options.rounds, wait) for name, works in steps.items()
    }
    results["flow_map_kept"] = compare_kept(forwards, modules)
    results["rollout_kept"] = compare_kept(rollouts, modules)
    return results


def main() -> None:
    global TIMES, TARGETS
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--compute", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--width", choices=tuple(WIDTHS), default="half")
    options = parser.parse_args()
    TIMES, TARGETS = TIMES.to(options.device), TARGETS.to(options.device)
    results = compare_sides(options)
    for name, values in results.items():
        print(name, {k: round(v, 8) if isinstance(v, float) else v for k, v in values.items()})
    about = {
        "device": gpu_name(options.device),
        "compute": options.compute,
        "width": options.width,
        "layers": options.layers,
    }
    print_result("train_step", {**about, "shape": list(LATENTS[options.width]), **results})


if __name__ == "__main__":
    main()
