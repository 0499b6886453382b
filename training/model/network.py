"""The module that is trained: export's transformer, with what training needs and inference does
not.

The layers, their names and their arithmetic are `model/transformer.py`'s, so a trained checkpoint
is exported as it is and there is one network to test. What is added:

- **types**: a trained weight is float32 and is cast to the compute type (bfloat16 on GPUs) for each
  product; a frozen one is stored in the compute type. Times, modulation, norms and residual stream
  are float32 always: bfloat16 steps by 4 above t = 512, so a time that passed through it is another
  time.
- **spans**: which keys a run of queries sees. Several chunks go through the linear layers at once
  and only attention is taken chunk by chunk: causal, without a mask and without flex attention
  (which has no backward on the CPU).
- **memory**: keys and values of clean frames as tensors of their own, never a buffer that is
  written again. A buffer would be changed by the time gradient checkpointing computes a chunk a
  second time.
- **one entrance**: everything goes through `forward` of the whole and of a block, where FSDP
  gathers the parameters. So the text's keys and values are made inside the block, not ahead of it.

Legend: see `anyflow_deploy/model/transformer.py`; M tokens in memory.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from anyflow_deploy.model.causal import make_compressed_embedding
from anyflow_deploy.model.rotary import COMPRESSED
from anyflow_deploy.model.transformer import (
    Attention,
    Block,
    FlowMapTransformer,
    KeyValue,
    Linear,
    Rotation,
    append_memory,
    modulate,
    split_modulation,
)
from anyflow_deploy.models import Architecture

KVCache = list[KeyValue]
"""Keys (rotated) and values, (B, M, A, E) each, layer by layer."""

TokenRange = tuple[int, int]
Span = tuple[TokenRange, tuple[TokenRange, ...]]
"""A run of queries, and the runs of keys (memory first, own tokens behind it) that it sees."""


class CastLinear(Linear):
    """A linear layer that multiplies in `compute_type`, whatever its weight is stored in.

    Attributes:
        compute_type: of the product and its result.
        large: one of those whose precision is chosen; the others (times, modulation, output) stay
            in float32.
    """

    compute_type = torch.float32
    large = False

    def forward(self, x: Tensor) -> Tensor:
        """(rows, inputs) of any type to (rows, outputs) of the compute type."""
        dtype = self.compute_type
        return F.linear(
            x.to(dtype), self.weight.to(dtype), None if self.bias is None else self.bias.to(dtype)
        )


class TrainingAttention(Attention):
    """Attention whose queries may see different keys."""

    def key_value(self, context: Tensor, batch: int, rotation: Rotation | None = None) -> KeyValue:
        """See `Attention`; `context` is cast by the layers."""
        return self._project_memory(context, batch, rotation)

    def forward(
        self,
        x: Tensor,
        memory: KeyValue,
        batch: int,
        rotation: Rotation | None = None,
        spans: Sequence[Span] | None = None,
    ) -> Tensor:
        """See `Attention`; with `spans`, each run of queries on its own keys. They cover all
        queries, in order."""
        query = self._normed_heads(self.norm_q, self.to_q(x), batch, rotation)
        if spans is None:
            mixed = self._attend(query, *memory)
        else:
            mixed = torch.cat(
                [
                    self._attend(query[:, a:b], *_gather_keys(memory, keys))
                    for (a, b), keys in spans
                ],
                dim=1,
            )
        return cast(Tensor, self.to_out[0](mixed.flatten(2).flatten(0, 1))).float()


def _gather_keys(memory: KeyValue, keys: tuple[TokenRange, ...]) -> KeyValue:
    if len(keys) == 1:
        ((a, b),) = keys
        return memory[0][:, a:b], memory[1][:, a:b]
    return cast(
        KeyValue, tuple(torch.cat([tensor[:, a:b] for a, b in keys], dim=1) for tensor in memory)
    )


class TrainingBlock(Block):
    """One layer, see `Block`.

    Attributes:
        checkpointing: keep only the inputs for the backward pass, and compute the layer again
            there.
        offloading: keep these inputs in main memory.

    Without `checkpointing`, what is only elementwise is computed again all the same: the result of
    GELU and the normed tokens before modulation, a quarter of what would be kept, at the cost of
    reading it once more. (torch stops computing again before the product that wanted the tensor.)
    Compiled blocks decide such things by themselves.
    """

    checkpointing = False
    offloading = False

    def __init__(self, a: Architecture, compute_type: torch.dtype) -> None:
        super().__init__(a, compute_type, fused=True)
        self.attn1 = TrainingAttention(a, compute_type, fused=True)
        self.attn2 = TrainingAttention(a, compute_type, fused=True)

    def forward(  # type: ignore[override]  # the text comes as embeddings, see the module's text
        self, x: Tensor, *inputs: Any
    ) -> tuple[Tensor | None, KeyValue | None]:
        """Run the layer, see `_layer`, in the way that `checkpointing` asks for."""
        if not self.checkpointing or not torch.is_grad_enabled():
            return self._layer(x, *inputs)
        offload_context = (
            torch.autograd.graph.save_on_cpu(pin_memory=x.is_cuda)
            if self.offloading
            else contextlib.nullcontext()
        )
        with offload_context:
            result = checkpoint(
                self._layer, x, *inputs, use_reentrant=False, preserve_rng_state=False
            )
        return cast("tuple[Tensor | None, KeyValue | None]", result)

    def _layer(
        self,
        x: Tensor,
        text: Tensor,
        modulation: Tensor,
        rotation: Rotation,
        ones: Tensor,
        past: KeyValue | None,
        spans: Sequence[Span] | None,
        outputs: str,
    ) -> tuple[Tensor | None, KeyValue | None]:
        """One layer.

        Args:
            x, modulation, rotation, ones, past: as in `Block`.
            text: embedded (B, L, D).
            spans: see `TimeSpan`; None lets every token see everything.
            outputs: "x", "memory" (the own keys and values) or "both".
        """
        batch, dtype = x.shape[0], compute_type_of(self.attn1.to_q)
        parts = split_modulation(self.scale_shift_table, modulation)
        shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = parts
        # Cast and kept once for three products
        h = self._recompute(modulate, x, shift, scale, ones, self.eps).flatten(0, 2).to(dtype)
        own = self.attn1.key_value(h, batch, rotation)
        if outputs == "memory":
            return None, own
        memory = append_memory(past, own)
        x = torch.addcmul(x, self.attn1(h, memory, batch, rotation, spans).view(x.shape), gate)
        text_kv = self.attn2.key_value(text.flatten(0, 1), batch)
        x = x + self.attn2(self.norm2(x).flatten(0, 2), text_kv, batch).view(x.shape)
        h = self._recompute(modulate, x, ffn_shift, ffn_scale, ones, self.eps).flatten(0, 2)
        hidden = self.ffn.net[0].get_submodule("proj")(h)
        x = torch.addcmul(
            x, self._recompute(self._ffn_down, hidden).float().view(x.shape), ffn_gate
        )
        return x, own if outputs == "both" else None

    def _ffn_down(self, hidden: Tensor) -> Tensor:
        """The feed-forward's second half."""
        return cast(Tensor, self.ffn.net[2](F.gelu(hidden, approximate="tanh")))

    def _recompute(self, function: Callable[..., Tensor], *inputs: object) -> Tensor:
        """Call, and keep nothing that can be computed again from what is given."""
        if self.checkpointing or not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return function(*inputs)
        return cast(
            Tensor, checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)
        )


def compute_type_of(layer: nn.Module) -> torch.dtype:
    """Of a linear layer, wrapped by LoRA or not."""
    return cast(CastLinear, getattr(layer, "base_layer", layer)).compute_type


def _to_cast_linear(
    layer: Linear, large: bool, compute_type: torch.dtype, frozen: bool
) -> CastLinear:
    dtype = compute_type if large else torch.float32
    stored = dtype if frozen else torch.float32
    result = CastLinear(layer.in_features, layer.out_features, layer.bias is not None, dtype=stored)
    result.compute_type, result.large = dtype, large
    return result


class TrainingTransformer(FlowMapTransformer):
    """`FlowMapTransformer`, and for causal architectures `ChunkTransition`, by parameter names; see
    the module's text.

    Args:
        a: the architecture.
        compute_type: of the large products.
        frozen: its weights are not trained themselves, so those of large products are stored in the
            compute type.

    Build it under `torch.device("meta")`, then load parameters and `constants`.
    """

    def __init__(
        self, a: Architecture, compute_type: torch.dtype = torch.float32, frozen: bool = False
    ) -> None:
        marker_type = torch.bfloat16  # export's layers say by their type which are large
        super().__init__(a, marker_type)
        self.architecture = a
        self.blocks = nn.ModuleList(TrainingBlock(a, marker_type) for _ in range(a.num_layers))
        self.compressed_patch = 0
        if a.compressed_patch_size is not None:
            self.compressed_patch = a.compressed_patch_size[1]
            self.far_patch_embedding = make_compressed_embedding(a)
        for name, layer in [(n, m) for n, m in self.named_modules() if type(m) is Linear]:
            self.set_submodule(
                name,
                _to_cast_linear(layer, layer.weight.dtype == marker_type, compute_type, frozen),
            )

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
        compressed: bool = False,
    ) -> Tensor | KVCache:
        """The velocity of some frames, or what later ones remember of them. Everything float32 at
        the border.

        Args:
            latents: (B, F, C, H, W).
            t, r: times of every frame, (B, F), in timesteps; slightly outside 0 to 1000 in finite
                differences.
            text: prompt embeddings, (B, L, text_dim).
            positions: int64 (F), absolute frame indices; None for 0, 1, 2, …
            past: memory of earlier frames, one entry a layer.
            spans: see `TimeSpan`.
            memory: return keys and values instead of the velocity; the last layer then computes
                nothing else.
            compressed: through the embedding of old chunks (compressed to larger patches).
        """
        _, frames, _, height, width = latents.shape
        patch, embedding = (
            (self.compressed_patch, self.far_patch_embedding)
            if compressed
            else (self.patch, self.patch_embedding)
        )
        rows, columns = height // patch, width // patch
        rotation = self.rope(frames, rows, columns, positions, COMPRESSED if compressed else "")
        x: Tensor | None = self.tokens(embedding, latents)
        times, modulation = self.embed_conditions(t, r)
        text_kv = self.condition_embedder.embed_text(text.flatten(0, 1)).view(*text.shape[:2], -1)
        ones, present = self.get_buffer("ones"), []
        last = len(self.blocks) - 1
        for index, block in enumerate(self.blocks):
            outputs = "x" if not memory else "both" if index < last else "memory"
            before = past[index] if past else None
            x, own = block(x, text_kv, modulation, rotation, ones, before, spans, outputs)
            present.append(own)
        if memory:
            return present
        assert x is not None
        return self.velocity_from_tokens(x, times, latents.shape)

    def set_gradient_checkpointing(self, enabled: bool = True, offload: bool = False) -> None:
        """Keep only each layer's input for the backward pass (in main memory, with `offload`), and
        compute the rest again."""
        for block in self.blocks:
            cast(TrainingBlock, block).checkpointing = enabled
            cast(TrainingBlock, block).offloading = offload

    @contextlib.contextmanager
    def override_compute_type(self, dtype: torch.dtype) -> Iterator[None]:
        """Make the large products in another type meanwhile: finite differences ask for float32."""
        layers = [m for m in self.modules() if isinstance(m, CastLinear) and m.large]
        before = [layer.compute_type for layer in layers]
        for layer in layers:
            layer.compute_type = dtype
        try:
            yield
        finally:
            for layer, old in zip(layers, before, strict=True):
                layer.compute_type = old
