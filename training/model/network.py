"""The module that is trained: export's transformer, with what training needs and inference does not.

The layers, their names and their arithmetic are `model/transformer.py`'s, so a trained checkpoint is exported as it is and
there is one network to test. What is added:

- **types**: a trained weight is float32 and is cast to the compute type (bfloat16 on GPUs) for each product; a frozen one is
  stored in the compute type. Times, modulation, norms and residual stream are float32 always: bfloat16 steps by 4 above
  t = 512, so a time that passed through it is another time.
- **spans**: which keys a run of queries sees. Several chunks go through the linear layers at once and only attention is
  taken chunk by chunk: causal, without a mask and without flex attention (which has no backward on the CPU).
- **memory**: keys and values of clean frames as tensors of their own, never a buffer that is written again. A buffer would
  be changed by the time gradient checkpointing computes a chunk a second time.
- **one entrance**: everything goes through `forward` of the whole and of a block, where FSDP gathers the parameters. So
  the text's keys and values are made inside the block, not ahead of it.

Legend: see `anyflow_deploy/model/transformer.py`; M tokens in memory.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from anyflow_deploy.model.rotary import COMPRESSED, rotated
from anyflow_deploy.model.transformer import (
    Attention,
    Block,
    FlowMapTransformer,
    KeyValue,
    Linear,
    Rotation,
    modulated,
)
from anyflow_deploy.models import Architecture

Memory = list[KeyValue]
"""Keys (rotated) and values, (B, M, A, E) each, layer by layer."""

Range = tuple[int, int]
Span = tuple[Range, tuple[Range, ...]]
"""A run of queries, and the runs of keys (memory first, own tokens behind it) that it sees."""


class CastLinear(Linear):
    """A linear layer that multiplies in `compute_type`, whatever its weight is stored in.

    Attributes:
        compute_type: of the product and its result.
        large: one of those whose precision is chosen; the others (times, modulation, output) stay in float32.
    """

    compute_type = torch.float32
    large = False

    def forward(self, x: Tensor) -> Tensor:
        """(rows, inputs) of any type to (rows, outputs) of the compute type."""
        kind = self.compute_type
        return F.linear(x.to(kind), self.weight.to(kind), None if self.bias is None else self.bias.to(kind))


class TrainingAttention(Attention):
    """Attention whose queries may see different keys."""

    def key_value(self, context: Tensor, batch: int, rotation: Rotation | None = None) -> KeyValue:
        """See `Attention`; `context` is cast by the layers."""
        value = self._heads(self.to_v(context), batch)
        key = self._heads(self.norm_k(self.to_k(context).float()), batch)
        if rotation is not None:
            key = rotated(key, *rotation)
        return key.to(value.dtype), value

    def forward(
        self, x: Tensor, memory: KeyValue, batch: int, rotation: Rotation | None = None, spans: Sequence[Span] | None = None
    ) -> Tensor:
        """See `Attention`; with `spans`, each run of queries on its own keys. They cover all queries, in order."""
        query = self._heads(self.norm_q(self.to_q(x).float()), batch)
        if rotation is not None:
            query = rotated(query, *rotation)
        if spans is None:
            mixed = self._attend(query, *memory)
        else:
            mixed = torch.cat([self._attend(query[:, a:b], *_seen(memory, keys)) for (a, b), keys in spans], dim=1)
        return cast(Tensor, self.to_out[0](mixed.flatten(2).flatten(0, 1))).float()


def _seen(memory: KeyValue, keys: tuple[Range, ...]) -> KeyValue:
    if len(keys) == 1:
        ((a, b),) = keys
        return memory[0][:, a:b], memory[1][:, a:b]
    return cast(KeyValue, tuple(torch.cat([tensor[:, a:b] for a, b in keys], dim=1) for tensor in memory))


class TrainingBlock(Block):
    """One layer, see `Block`.

    Attributes:
        checkpointing: keep only the inputs for the backward pass, and compute the layer again there.
        offloading: keep these inputs in main memory.

    Without `checkpointing`, what is only elementwise is computed again all the same: the result of GELU and the normed tokens
    before modulation, a quarter of what would be kept, at the cost of reading it once more. (torch stops computing again
    before the product that wanted the tensor.) Compiled blocks decide such things by themselves.
    """

    checkpointing = False
    offloading = False

    def __init__(self, a: Architecture, compute_type: torch.dtype) -> None:
        super().__init__(a, compute_type, fused=True)
        self.attn1 = TrainingAttention(a, compute_type, fused=True)
        self.attn2 = TrainingAttention(a, compute_type, fused=True)

    def forward(  # type: ignore[override]  # the text comes as embeddings, see the module's text
        self,
        x: Tensor,
        text: Tensor,
        modulation: Tensor,
        rotation: Rotation,
        ones: Tensor,
        past: KeyValue | None,
        spans: Sequence[Span] | None,
        wanted: str,
    ) -> tuple[Tensor | None, KeyValue | None]:
        """One layer.

        Args:
            x, modulation, rotation, ones, past: as in `Block`.
            text: embedded (B, L, D).
            spans: see `Span`; None lets every token see everything.
            wanted: "x", "memory" (the own keys and values) or "both".
        """
        given = (x, text, modulation, rotation, ones, past, spans, wanted)
        if self.checkpointing and torch.is_grad_enabled():
            away = torch.autograd.graph.save_on_cpu(pin_memory=x.is_cuda) if self.offloading else contextlib.nullcontext()
            with away:
                result = checkpoint(self._layer, *given, use_reentrant=False, preserve_rng_state=False)
            return cast("tuple[Tensor | None, KeyValue | None]", result)
        return self._layer(*given)

    def _layer(
        self,
        x: Tensor,
        text: Tensor,
        modulation: Tensor,
        rotation: Rotation,
        ones: Tensor,
        past: KeyValue | None,
        spans: Sequence[Span] | None,
        wanted: str,
    ) -> tuple[Tensor | None, KeyValue | None]:
        batch, kind = x.shape[0], compute_type_of(self.attn1.to_q)
        shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = (self.scale_shift_table + modulation).unsqueeze(2).unbind(3)
        h = (
            self._again(modulated, x, shift, scale, ones, self.eps).flatten(0, 2).to(kind)
        )  # cast and kept once for three products
        own = self.attn1.key_value(h, batch, rotation)
        if wanted == "memory":
            return None, own
        memory = own if past is None else (torch.cat((past[0], own[0]), 1), torch.cat((past[1], own[1]), 1))
        x = torch.addcmul(x, self.attn1(h, memory, batch, rotation, spans).view(x.shape), gate)
        words = self.attn2.key_value(text.flatten(0, 1), batch)
        x = x + self.attn2(self.norm2(x).flatten(0, 2), words, batch).view(x.shape)
        h = self._again(modulated, x, ffn_shift, ffn_scale, ones, self.eps).flatten(0, 2)
        hidden = self.ffn.net[0].get_submodule("proj")(h)
        x = torch.addcmul(x, self._again(self._down, hidden).float().view(x.shape), ffn_gate)
        return x, own if wanted == "both" else None

    def _down(self, hidden: Tensor) -> Tensor:
        """The feed-forward's second half."""
        return cast(Tensor, self.ffn.net[2](F.gelu(hidden, approximate="tanh")))

    def _again(self, work: Callable[..., Tensor], *given: object) -> Tensor:
        """Call, and keep nothing that can be computed again from what is given."""
        if self.checkpointing or not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return work(*given)
        return cast(Tensor, checkpoint(work, *given, use_reentrant=False, preserve_rng_state=False))


def compute_type_of(layer: nn.Module) -> torch.dtype:
    """Of a linear layer, wrapped by LoRA or not."""
    return cast(CastLinear, getattr(layer, "base_layer", layer)).compute_type


def _cast_linear(layer: Linear, large: bool, compute_type: torch.dtype, frozen: bool) -> CastLinear:
    kind = compute_type if large else torch.float32
    stored = kind if frozen else torch.float32
    result = CastLinear(layer.in_features, layer.out_features, layer.bias is not None, dtype=stored)
    result.compute_type, result.large = kind, large
    return result


class TrainingTransformer(FlowMapTransformer):
    """`FlowMapTransformer`, and for causal architectures `ChunkTransition`, by parameter names; see the module's text.

    Args:
        a: the architecture.
        compute_type: of the large products.
        frozen: its weights are not trained themselves, so those of large products are stored in the compute type.

    Build it under `torch.device("meta")`, then load parameters and `constants`.
    """

    def __init__(self, a: Architecture, compute_type: torch.dtype = torch.float32, frozen: bool = False) -> None:
        marked = torch.bfloat16  # export's layers say by their type which are large
        super().__init__(a, marked)
        self.architecture = a
        self.blocks = nn.ModuleList(TrainingBlock(a, marked) for _ in range(a.num_layers))
        self.far_patch = 0
        if a.compressed_patch_size is not None:
            self.far_patch = a.compressed_patch_size[1]
            self.far_patch_embedding = nn.Conv3d(a.in_channels, a.inner_dim, a.compressed_patch_size, a.compressed_patch_size)
        for name, layer in [(n, m) for n, m in self.named_modules() if type(m) is Linear]:
            self.set_submodule(name, _cast_linear(layer, layer.weight.dtype == marked, compute_type, frozen))

    def forward(  # type: ignore[override]  # velocity or memory, of some frames
        self,
        latents: Tensor,
        t: Tensor,
        r: Tensor,
        text: Tensor,
        positions: Tensor | None = None,
        past: Sequence[KeyValue] = (),
        spans: Sequence[Span] | None = None,
        memory: bool = False,
        coarse: bool = False,
    ) -> Tensor | Memory:
        """The velocity of some frames, or what later ones remember of them. Everything float32 at the border.

        Args:
            latents: (B, F, C, H, W).
            t, r: times of every frame, (B, F), in timesteps; slightly outside 0 to 1000 in finite differences.
            text: prompt embeddings, (B, L, text_dim).
            positions: int64 (F), absolute frame indices; None for 0, 1, 2, …
            past: memory of earlier frames, one entry a layer.
            spans: see `Span`.
            memory: return keys and values instead of the velocity; the last layer then computes nothing else.
            coarse: through the embedding of old chunks (compressed to larger patches).
        """
        batch, frames, _, height, width = latents.shape
        patch, embedding = (self.far_patch, self.far_patch_embedding) if coarse else (self.patch, self.patch_embedding)
        rows, columns = height // patch, width // patch
        rotation = self.rope(frames, rows, columns, positions, COMPRESSED if coarse else "")
        x: Tensor | None = self.tokens(embedding, latents)
        times, modulation = self.conditions(t, r)
        words = self.condition_embedder.text(text.flatten(0, 1)).view(*text.shape[:2], -1)
        ones, present = self.get_buffer("ones"), []
        last = len(self.blocks) - 1
        for index, block in enumerate(self.blocks):
            wanted = "x" if not memory else "both" if index < last else "memory"
            x, own = block(x, words, modulation, rotation, ones, past[index] if past else None, spans, wanted)
            present.append(own)
        if memory:
            return present
        assert x is not None
        shift, scale = (self.scale_shift_table + times.view(batch, frames, 1, -1)).unsqueeze(2).unbind(3)
        x = modulated(x, shift, scale, ones, self.eps)
        return self._image(self.proj_out(x.flatten(0, 2)).view(batch, frames, rows, columns, -1))

    def checkpoint_gradients(self, on: bool = True, offload: bool = False) -> None:
        """Keep only each layer's input for the backward pass (in main memory, with `offload`), and compute the rest again."""
        for block in self.blocks:
            cast(TrainingBlock, block).checkpointing = on
            cast(TrainingBlock, block).offloading = offload

    @contextlib.contextmanager
    def computing(self, kind: torch.dtype) -> Iterator[None]:
        """Make the large products in another type meanwhile: finite differences ask for float32."""
        layers = [m for m in self.modules() if isinstance(m, CastLinear) and m.large]
        before = [layer.compute_type for layer in layers]
        for layer in layers:
            layer.compute_type = kind
        try:
            yield
        finally:
            for layer, old in zip(layers, before, strict=True):
                layer.compute_type = old
