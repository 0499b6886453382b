"""The module that is trained: the transformer of exports, with additions for training.

The layers, their names and their arithmetic are those of `model/transformer.py`, so a trained
checkpoint is exported as it is and there is one network to test. The additions:

- **types**: a trained weight is float32 and is cast to the compute type (bfloat16 on GPUs) for each
  product; a frozen one is stored in the compute type. Times, modulation, norms and residual stream
  are always float32: bfloat16 has steps of 4 above t = 512, which would round the times.
- **spans**: the keys that a run of queries sees. Several chunks go through the linear layers at
  once, and only attention is computed chunk by chunk: causal, without a mask and without flex
  attention (which has no backward on the CPU).
- **memory**: keys and values of clean frames as tensors of their own, never a buffer that is
  written again. Gradient checkpointing computes a chunk a second time, when a buffer would have
  other contents.
- **one entry point**: everything goes through `forward` of the whole and of a block, where FSDP
  gathers the parameters. So the text's keys and values are computed inside the block, not before.

Legend: see `anyflow_deploy/model/transformer.py`; M tokens in memory.
"""

from __future__ import annotations

import contextlib
import math
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
        large: whether it multiplies in the recipe's compute type; the other layers (times,
            modulation, output) stay in float32.
    """

    compute_type = torch.float32
    large = False

    def forward(self, x: Tensor) -> Tensor:
        """Multiply (rows, inputs) of any type into (rows, outputs) of the compute type."""
        dtype = self.compute_type
        return F.linear(
            x.to(dtype), self.weight.to(dtype), None if self.bias is None else self.bias.to(dtype)
        )


class TrainingAttention(Attention):
    """Attention whose queries may see different keys."""

    def key_value(self, context: Tensor, batch: int, rotation: Rotation | None = None) -> KeyValue:
        """Return keys and values of a context, (B, M, A, E) each.

        The context is (B M, D), and the layers cast it.
        """
        return self._project_memory(context, batch, rotation)

    def forward(
        self,
        x: Tensor,
        memory: KeyValue,
        batch: int,
        rotation: Rotation | None = None,
        spans: Sequence[Span] | None = None,
        bias: Tensor | None = None,
    ) -> Tensor:
        """Attend from `x` to the memory; with `spans`, each run of queries to its own keys.

        Spans cover all queries, in order. `bias` (M) is added to every query's scores; it excludes
        spans. The result is float32 (B N, D).
        """
        query = self._normed_heads(self.norm_q, self.to_q(x), batch, rotation)
        if bias is not None:
            output = self._attend_with_bias(query, *memory, bias)
        elif spans is None:
            output = self._attend(query, *memory)
        else:
            output = torch.cat(
                [
                    self._attend(query[:, a:b], *_gather_keys(memory, keys))
                    for (a, b), keys in spans
                ],
                dim=1,
            )
        return cast(Tensor, self.to_out[0](output.flatten(2).flatten(0, 1))).float()

    def _attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Compute softmax attention over (B, N, A, E).

        On the CPU in float32: the backward pass of torch's bfloat16 kernel is seven times slower
        there (measured with torch 2.13 on a processor with AMX).
        """
        if value.dtype == torch.bfloat16 and value.device.type == "cpu":
            key, value = key.float(), value.float()
        return super()._attend(query, key, value)

    def _attend_with_bias(self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
        """Compute softmax attention over (B, N, A, E) with a bias of each key."""
        if value.dtype == torch.bfloat16 and value.device.type == "cpu":
            key, value = key.float(), value.float()
        query = (query * self.scale).to(value.dtype)
        result = F.scaled_dot_product_attention(
            query.transpose(1, 2),
            key.transpose(1, 2),
            value.transpose(1, 2),
            attn_mask=bias.to(value.dtype)[None, None, None],
            scale=1.0,
        )
        return result.transpose(1, 2)


def merge_padding(text: Tensor) -> tuple[Tensor, Tensor | None]:
    """Keep one of the zero rows behind the prompts, in the place of all.

    Zero rows all have the same key k and value. So n of them weigh as much in a softmax as one with
    log(n) added to its score: the result of attention is the same, at a fraction of the cost.

    Args:
        text: prompt embeddings, (B, L, D).

    Returns:
        The rows that are kept, (B, M, D), and what to add to their scores, float32 (M); None where
        no prompt has two zero rows behind it.
    """
    used_rows = text.abs().amax((0, 2)).nonzero()
    used = int(used_rows[-1]) + 1 if len(used_rows) else 0
    padding = text.shape[1] - used
    if padding < 2:
        return text, None
    bias = text.new_zeros(used + 1)
    bias[-1] = math.log(padding)
    return text[:, : used + 1], bias


def _gather_keys(memory: KeyValue, keys: tuple[TokenRange, ...]) -> KeyValue:
    if len(keys) == 1:
        ((a, b),) = keys
        return memory[0][:, a:b], memory[1][:, a:b]
    return cast(
        KeyValue, tuple(torch.cat([tensor[:, a:b] for a, b in keys], dim=1) for tensor in memory)
    )


class TrainingBlock(Block):
    """One transformer layer with gradient checkpointing.

    Attributes:
        checkpointing: keep only the inputs for the backward pass, and recompute the layer there.
        offloading: keep these inputs in main memory.

    Without `checkpointing`, elementwise results are recomputed all the same: the result of GELU and
    the normed tokens before modulation. That saves a quarter of the memory, at the cost of reading
    the inputs once more. (torch stops recomputing before the product that needs the tensor.)
    Compiled blocks decide this by themselves.
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
        text_bias: Tensor | None = None,
    ) -> tuple[Tensor | None, KeyValue | None]:
        """Run one layer, and return its output and its own keys and values.

        Args:
            x, modulation, rotation, ones, past: as in `Block`.
            text: embedded (B, L, D).
            spans: see `Span`; None lets every token see everything.
            outputs: "x", "memory" (its own keys and values) or "both".
            text_bias: from `merge_padding`, (L).
        """
        batch, dtype = x.shape[0], compute_type_of(self.attn1.to_q)
        parts = split_modulation(self.scale_shift_table, modulation)
        shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = parts
        # Cast and kept once for three products
        h = self._recompute(modulate, x, shift, scale, ones, self.eps).flatten(0, 2).to(dtype)
        new_kv = self.attn1.key_value(h, batch, rotation)
        if outputs == "memory":
            return None, new_kv
        memory = append_memory(past, new_kv)
        x = torch.addcmul(x, self.attn1(h, memory, batch, rotation, spans).view(x.shape), gate)
        text_kv = self.attn2.key_value(text.flatten(0, 1), batch)
        from_text = self.attn2(self.norm2(x).flatten(0, 2), text_kv, batch, bias=text_bias)
        x = x + from_text.view(x.shape)
        h = self._recompute(modulate, x, ffn_shift, ffn_scale, ones, self.eps).flatten(0, 2)
        hidden = self.ffn.net[0].get_submodule("proj")(h)
        x = torch.addcmul(
            x, self._recompute(self._ffn_down, hidden).float().view(x.shape), ffn_gate
        )
        return x, new_kv if outputs == "both" else None

    def _ffn_down(self, hidden: Tensor) -> Tensor:
        """Return the result of the feed-forward's second half."""
        return cast(Tensor, self.ffn.net[2](F.gelu(hidden, approximate="tanh")))

    def _recompute(self, function: Callable[..., Tensor], *inputs: object) -> Tensor:
        """Call a function, and recompute it in the backward pass instead of keeping its tensors."""
        if self.checkpointing or not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return function(*inputs)
        return cast(
            Tensor, checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)
        )


def compute_type_of(layer: nn.Module) -> torch.dtype:
    """Return the compute type of a linear layer, wrapped by LoRA or not."""
    return cast(CastLinear, getattr(layer, "base_layer", layer)).compute_type


def _to_cast_linear(
    layer: Linear, large: bool, compute_type: torch.dtype, frozen: bool
) -> CastLinear:
    dtype = compute_type if large else torch.float32
    storage_type = dtype if frozen else torch.float32
    result = CastLinear(
        layer.in_features, layer.out_features, layer.bias is not None, dtype=storage_type
    )
    result.compute_type = dtype
    result.large = large
    return result


class TrainingTransformer(FlowMapTransformer):
    """`FlowMapTransformer` for training.

    For causal architectures it has the parameters of `ChunkTransition`.

    Args:
        a: the architecture.
        compute_type: of the large products.
        frozen: store the weights of large products in the compute type, since only adapters or
            nothing is trained.

    Build it under `torch.device("meta")`, then load parameters and `constants`.

    Attributes:
        merges_padding: compute the zero rows behind the prompts once, see `merge_padding`.
    """

    merges_padding = False

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
        """Return the velocity of some frames, or their keys and values.

        Inputs and results are float32.

        Args:
            latents: (B, F, C, H, W).
            t, r: times of every frame, (B, F), in timesteps; slightly outside 0 to 1000 in finite
                differences.
            text: prompt embeddings, (B, L, text_dim).
            positions: int64 (F), absolute frame indices; None for 0, 1, 2, …
            past: memory of earlier frames, one entry a layer.
            spans: see `Span`.
            memory: return keys and values instead of the velocity; the last layer then computes
                nothing else.
            compressed: use the embedding of old chunks, which has larger patches.
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
        text_bias = None
        if self.merges_padding:
            text, text_bias = merge_padding(text)
        text_kv = self.condition_embedder.embed_text(text.flatten(0, 1)).view(*text.shape[:2], -1)
        ones = self.get_buffer("ones")
        cache: KVCache = []
        last = len(self.blocks) - 1
        for index, block in enumerate(self.blocks):
            outputs = "x" if not memory else "both" if index < last else "memory"
            before = past[index] if past else None
            x, new_kv = block(
                x, text_kv, modulation, rotation, ones, before, spans, outputs, text_bias
            )
            cache.append(new_kv)
        if memory:
            return cache
        assert x is not None
        return self.velocity_from_tokens(x, times, latents.shape)

    def set_gradient_checkpointing(self, enabled: bool = True, offload: bool = False) -> None:
        """Set whether the backward pass recomputes each layer from its input.

        With `offload` these inputs are kept in main memory.
        """
        for block in self.blocks:
            cast(TrainingBlock, block).checkpointing = enabled
            cast(TrainingBlock, block).offloading = offload

    @contextlib.contextmanager
    def override_compute_type(self, dtype: torch.dtype) -> Iterator[None]:
        """Compute large products in another type until the block ends.

        Finite differences need float32.
        """
        layers = [m for m in self.modules() if isinstance(m, CastLinear) and m.large]
        previous_types = [layer.compute_type for layer in layers]
        for layer in layers:
            layer.compute_type = dtype
        try:
            yield
        finally:
            for layer, old in zip(layers, previous_types, strict=True):
                layer.compute_type = old
