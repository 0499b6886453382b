"""The flow-map transformer as one traceable module: `(z_t, t, r, text) -> z_r`.

The same network as diffusers' AnyFlowTransformer3DModel, with the same parameter names, written for
compilers:

- the Euler step `z_r = z_t - (t - r)/1000 * u` is inside, so a runtime needs no arithmetic of its
  own;
- modulation stays per frame and broadcasts, where diffusers expands it to every token (1.2 GB at
  1.3B and 480p);
- rotary is real float32 (see `rotary`), and no shape is baked in but the channels;
- every linear layer works on rows of tokens, which ONNX expresses as one Gemm that reads the weight
  as stored.

Precision is decided here and nowhere else: a parameter has the type it is stored and computed in.
The large layers take `compute_type`; residual stream, norms, modulation, time path, patch embedding
and output projection are float32.

Attention and RMS norm exist in two forms that compute the same: `fused=True` calls torch's own
operators, which become `Attention` and `RMSNormalization` in ONNX opset 23 and flash attention
under a compiler; `fused=False` spells them out in operators that TensorRT 10.3 reads (opset 20).
`set_fused_attention` chooses for attention alone.

Legend: B batch, F latent frames, C latent channels, H W latent rows and columns, h w the same in
patches, p patch side, S = h w tokens per frame, N = F S tokens, L text tokens, D channels of the
residual stream, A heads, E channels of a head. Two letters side by side, as in (B N, D), are one
dimension. Source: arXiv 2605.13724.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anyflow_deploy.model.rotary import Rotary, apply_rotary, rotary_tables
from anyflow_deploy.models import Architecture
from anyflow_deploy.schedule import TRAIN_TIMESTEPS

Rotation = tuple[Tensor, Tensor]
KeyValue = tuple[Tensor, Tensor]


class Linear(nn.Linear):
    """A linear layer that takes its input in any type and returns its own type.

    Inputs are (rows, channels): two dimensions make one Gemm in ONNX, where three would need the
    weight transposed.
    """

    @property
    def input_type(self) -> torch.dtype:
        """Type of the weights, of the converted input, and of the output."""
        return self.weight.dtype

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.to(self.input_type), self.weight, self.bias)


class RMSNorm(nn.Module):
    """`x / sqrt(mean(x^2) + eps) * weight` over all heads at once, as Wan was trained."""

    def __init__(self, channels: int, eps: float, fused: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels))
        self.eps = eps
        self.fused = fused

    def forward(self, x: Tensor) -> Tensor:
        if self.fused:
            return F.rms_norm(x, (x.shape[-1],), self.weight, self.eps)
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * self.weight


class Attention(nn.Module):
    """Multi-head attention with normed queries and keys; rotary where a rotation is given."""

    def __init__(self, a: Architecture, compute_type: torch.dtype, fused: bool) -> None:
        super().__init__()
        d = a.inner_dim
        self.heads = a.num_attention_heads
        self.scale = 1.0 / math.sqrt(a.attention_head_dim)
        self.fused = fused
        self.to_q = Linear(d, d, dtype=compute_type)
        self.to_k = Linear(d, d, dtype=compute_type)
        self.to_v = Linear(d, d, dtype=compute_type)
        self.to_out = nn.ModuleList([Linear(d, d, dtype=compute_type)])
        self.norm_q = RMSNorm(d, a.eps, fused)
        self.norm_k = RMSNorm(d, a.eps, fused)

    def forward(
        self, x: Tensor, memory: KeyValue, batch: int, rotation: Rotation | None = None
    ) -> Tensor:
        """Attend with queries from `x` (B N, D) to `memory`; return float32 (B N, D)."""
        query = self._normed_heads(self.norm_q, self.to_q(x), batch, rotation)
        values = self._attend(query, *memory)
        return cast(Tensor, self.to_out[0](values.flatten(2).flatten(0, 1))).float()

    def key_value(self, context: Tensor, batch: int, rotation: Rotation | None = None) -> KeyValue:
        """Compute rotated keys, and values, of `context` (B M, D): (B, M, A, E) each.

        Keys are rotated here so that they can be cached.
        """
        return self._project_memory(context.to(self.to_k.input_type), batch, rotation)

    def _project_memory(self, context: Tensor, batch: int, rotation: Rotation | None) -> KeyValue:
        """Compute `key_value` of a context that is in the layers' type."""
        value = self._split_heads(self.to_v(context), batch)
        key = self._normed_heads(self.norm_k, self.to_k(context), batch, rotation)
        return key.to(value.dtype), value

    def _normed_heads(
        self, norm: RMSNorm, x: Tensor, batch: int, rotation: Rotation | None
    ) -> Tensor:
        """(B N, D) to (B, N, A, E) in float32, normed, and rotated where a rotation is given."""
        heads = self._split_heads(norm(x.float()), batch)
        return heads if rotation is None else apply_rotary(heads, *rotation)

    def _split_heads(self, x: Tensor, batch: int) -> Tensor:
        """Reshape (B N, D) to (B, N, A, E)."""
        return x.view(batch, x.shape[0] // batch, self.heads, -1)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Compute softmax attention over (B, N, A, E), in the type of `value`.

        The scale goes onto the queries in float32: scores in fp16 would come close to its largest
        number otherwise.
        """
        query = (query * self.scale).to(value.dtype)
        query = query.transpose(1, 2)
        key = key.transpose(1, 2)
        value = value.transpose(1, 2)
        if self.fused:
            result = F.scaled_dot_product_attention(query, key, value, scale=1.0)
        else:
            result = torch.softmax(query @ key.transpose(-1, -2), dim=-1) @ value
        return result.transpose(1, 2)


class FeedForward(nn.Module):
    """Linear, GELU (tanh form), linear; named as diffusers' FeedForward."""

    def __init__(self, channels: int, hidden: int, compute_type: torch.dtype) -> None:
        super().__init__()
        first = nn.Module()
        first.add_module("proj", Linear(channels, hidden, dtype=compute_type))
        self.net = nn.ModuleList(
            [first, nn.Identity(), Linear(hidden, channels, dtype=compute_type)]
        )

    def forward(self, x: Tensor) -> Tensor:
        proj = cast(Linear, self.net[0].get_submodule("proj"))
        hidden = F.gelu(proj(x), approximate="tanh")
        return cast(Tensor, self.net[2](hidden)).float()


class Block(nn.Module):
    """Self-attention, cross-attention to the text, and feed-forward.

    Each is modulated by the time embedding of each frame.
    """

    def __init__(self, a: Architecture, compute_type: torch.dtype, fused: bool) -> None:
        super().__init__()
        d = a.inner_dim
        self.eps = a.eps
        self.attn1 = Attention(a, compute_type, fused)
        self.attn2 = Attention(a, compute_type, fused)
        self.norm2 = nn.LayerNorm(d, a.eps) if a.cross_attn_norm else nn.Identity()
        self.ffn = FeedForward(d, a.ffn_dim, compute_type)
        self.scale_shift_table = nn.Parameter(torch.empty(1, 6, d))

    def forward(
        self,
        x: Tensor,
        text_kv: KeyValue,
        modulation: Tensor,
        rotation: Rotation,
        ones: Tensor,
        past: KeyValue | None = None,
    ) -> tuple[Tensor, KeyValue]:
        """Run one layer.

        Args:
            x: float32 (B, F, S, D).
            text_kv: keys and values of the text, (B, L, A, E).
            modulation: float32 (B, F, 6, D).
            rotation: of the tokens of `x`.
            ones: float32 (D), the weight of the norms in `modulate`.
            past: keys and values of earlier chunks, which come before the own ones.

        Returns:
            float32 (B, F, S, D), and the own keys and values.
        """
        batch = x.shape[0]
        parts = split_modulation(self.scale_shift_table, modulation)
        shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = parts
        h = modulate(x, shift, scale, ones, self.eps).flatten(0, 2).to(self.attn1.to_q.input_type)
        present_kv = self.attn1.key_value(h, batch, rotation)
        memory = append_memory(past, present_kv)
        x = x + self.attn1(h, memory, batch, rotation).view(x.shape) * gate
        x = x + self.attn2(self.norm2(x).flatten(0, 2), text_kv, batch).view(x.shape)
        h = modulate(x, ffn_shift, ffn_scale, ones, self.eps).flatten(0, 2)
        return cast(Tensor, x + self.ffn(h).view(x.shape) * ffn_gate), present_kv

    def key_value(
        self, x: Tensor, modulation: Tensor, rotation: Rotation, ones: Tensor
    ) -> KeyValue:
        """Compute the layer's own keys and values alone, for a last layer that fills the cache."""
        shift, scale = split_modulation(self.scale_shift_table, modulation)[:2]
        h = modulate(x, shift, scale, ones, self.eps).flatten(0, 2)
        return self.attn1.key_value(h, x.shape[0], rotation)


def append_memory(past: KeyValue | None, present: KeyValue) -> KeyValue:
    """Put keys and values (B, N, A, E) behind those of earlier chunks (B, M, A, E), if any."""
    if past is None:
        return present
    return torch.cat((past[0], present[0]), 1), torch.cat((past[1], present[1]), 1)


def split_modulation(table: Tensor, modulation: Tensor) -> tuple[Tensor, ...]:
    """Add the learned table (1, n, D) to the modulation (B, F, n, D); n parts (B, F, 1, D)."""
    return (table + modulation).unsqueeze(2).unbind(3)


def modulate(x: Tensor, shift: Tensor, scale: Tensor, ones: Tensor, eps: float) -> Tensor:
    """Normalize `x` (B, F, S, D), then scale and shift it by the time, (B, F, 1, D) each.

    The norm has no weights of its own, but ONNX wants some: `ones` (D) is one constant for all.
    """
    return F.layer_norm(x, ones.shape, ones, eps=eps) * (1 + scale) + shift


class EmbedderMLP(nn.Module):
    """Linear, activation, linear: the shape of diffusers' time and text embedders."""

    def __init__(self, inputs: int, outputs: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.linear_1 = Linear(inputs, outputs, dtype=dtype)
        self.linear_2 = Linear(outputs, outputs, dtype=dtype)


class ConditionEmbedder(nn.Module):
    """Embeds the two times of every frame, and the text."""

    def __init__(self, a: Architecture, compute_type: torch.dtype) -> None:
        super().__init__()
        d = a.inner_dim
        self.gate = a.gate_value
        self.difference = a.deltatime_type == "t-r"
        self.time_embedder = EmbedderMLP(a.freq_dim, d, torch.float32)
        self.delta_embedder = EmbedderMLP(a.freq_dim, d, torch.float32)
        self.time_proj = Linear(d, 6 * d)
        self.text_embedder = EmbedderMLP(a.text_dim, d, compute_type)
        self.register_buffer("frequencies", torch.empty(a.freq_dim // 2), persistent=False)

    def time_embedding(self, t: Tensor, r: Tensor) -> Tensor:
        """Embed t and r, float32 (rows) each: `(1 - g) emb(t) + g emb_delta(r)`, (rows, D)."""
        first = self._embed_time(self.time_embedder, t)
        second = self._embed_time(self.delta_embedder, t - r if self.difference else r)
        return (1.0 - self.gate) * first + self.gate * second

    def _embed_time(self, layers: EmbedderMLP, time: Tensor) -> Tensor:
        angles = time.unsqueeze(-1) * self.get_buffer("frequencies")
        waves = torch.cat((angles.cos(), angles.sin()), dim=-1)
        return cast(Tensor, layers.linear_2(F.silu(layers.linear_1(waves))))

    def embed_text(self, text: Tensor) -> Tensor:
        """Embed prompt embeddings (B L, text_dim) to (B L, D), in the compute type."""
        hidden = F.gelu(self.text_embedder.linear_1(text), approximate="tanh")
        return cast(Tensor, self.text_embedder.linear_2(hidden))


class FlowMapTransformer(nn.Module):
    """The network that computes one transition of a flow map.

    Args:
        a: the architecture.
        compute_type: type of the large layers' weights and products.
        fused: use torch's own attention and RMS norm, as the module's text explains.

    Build it under `torch.device("meta")` or a fake mode, or load parameters (diffusers' names) and
    `constants`.
    """

    def __init__(
        self, a: Architecture, compute_type: torch.dtype = torch.float32, fused: bool = True
    ) -> None:
        super().__init__()
        d = a.inner_dim
        self.patch = a.patch_size[1]
        self.eps = a.eps
        self.rope = Rotary(a)
        self.patch_embedding = nn.Conv3d(a.in_channels, d, a.patch_size, a.patch_size)
        self.condition_embedder = ConditionEmbedder(a, compute_type)
        self.blocks = nn.ModuleList(Block(a, compute_type, fused) for _ in range(a.num_layers))
        self.proj_out = Linear(d, a.out_channels * math.prod(a.patch_size))
        self.scale_shift_table = nn.Parameter(torch.empty(1, 2, d))
        self.register_buffer("ones", torch.empty(d), persistent=False)

    def set_fused_attention(self, fused: bool) -> None:
        """Choose the form of all attentions, whatever that of the norms is; see the module's
        text."""
        for module in self.modules():
            if isinstance(module, Attention):
                module.fused = fused

    def forward(self, latents: Tensor, t: Tensor, r: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        """Move latents from t to r. Inputs and outputs are float32.

        Args:
            latents: z_t, (B, F, C, H, W).
            t, r: source and target time of every frame, (B, F), in timesteps 0 to 1000.
            text: prompt embeddings, (B, L, text_dim), padded as in training (Wan: 512 tokens, zeros
                behind the prompt).

        Returns:
            z_r (B, F, C, H, W), and the average velocity u from t to r that led there, of the same
            shape.
        """
        _, frames, _, height, width = latents.shape
        rotation = self.rope(frames, height // self.patch, width // self.patch)
        z_r, velocity, _ = self.transition(latents, t, r, self.text_key_values(text), rotation)
        return z_r, velocity

    def transition(
        self,
        latents: Tensor,
        t: Tensor,
        r: Tensor,
        text_kv: Iterable[KeyValue],
        rotation: Rotation,
        past: Sequence[KeyValue] = (),
    ) -> tuple[Tensor, Tensor, list[KeyValue]]:
        """Run `forward` with the rotation, the text's keys and values, and the past's.

        `text_kv` and `past` have one pair for each layer. It also returns the own keys and values.
        """
        x = self.tokens(self.patch_embedding, latents)
        time_embedding, modulation = self.embed_conditions(t, r)
        ones = self.get_buffer("ones")
        present = []
        for index, (block, text) in enumerate(zip(self.blocks, text_kv, strict=True)):
            x, present_kv = block(
                x, text, modulation, rotation, ones, past[index] if past else None
            )
            present.append(present_kv)
        velocity = self.velocity_from_tokens(x, time_embedding, latents.shape)
        interval = ((t - r) / TRAIN_TIMESTEPS)[:, :, None, None, None]
        return latents - interval * velocity, velocity, present

    def tokens(self, embedding: nn.Module, latents: Tensor) -> Tensor:
        """Turn latents (B, F, C, H, W) into tokens (B, F, S, D)."""
        x = embedding(latents.flatten(0, 1).unsqueeze(2))
        return cast(Tensor, x.flatten(2).transpose(1, 2).unflatten(0, latents.shape[:2]))

    def velocity_from_tokens(
        self, x: Tensor, time_embedding: Tensor, shape: tuple[int, ...]
    ) -> Tensor:
        """Tokens (B, F, S, D) and time embedding (B F, D) to a velocity of the latents' shape."""
        batch, frames, _, height, width = shape
        times = time_embedding.view(batch, frames, 1, -1)
        shift, scale = split_modulation(self.scale_shift_table, times)
        x = modulate(x, shift, scale, self.get_buffer("ones"), self.eps)
        grid = (height // self.patch, width // self.patch)
        return self._unpatchify(self.proj_out(x.flatten(0, 2)).view(batch, frames, *grid, -1))

    def _unpatchify(self, x: Tensor) -> Tensor:
        """Patches (B, F, h, w, p p C) back to (B, F, C, H, W)."""
        x = x.view(*x.shape[:-1], self.patch, self.patch, -1)
        return x.permute(0, 1, 6, 2, 4, 3, 5).flatten(5, 6).flatten(3, 4)

    def embed_conditions(self, t: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
        """Embed the times: time embedding (B F, D), and the modulation (B, F, 6, D)."""
        time_embedding = self.condition_embedder.time_embedding(t.flatten(), r.flatten())
        return time_embedding, self.condition_embedder.time_proj(F.silu(time_embedding)).view(
            *t.shape, 6, -1
        )

    def text_key_values(self, text: Tensor) -> Iterator[KeyValue]:
        """Yield keys and values (B, L, A, E) of the text (B, L, text_dim), layer by layer."""
        embeds = self.condition_embedder.embed_text(text.flatten(0, 1))
        return (cast(Block, block).attn2.key_value(embeds, text.shape[0]) for block in self.blocks)


def constants(a: Architecture) -> dict[str, Tensor]:
    """Compute the tensors of `FlowMapTransformer` that are not learned, by name."""
    half = a.freq_dim // 2
    frequencies = torch.exp(-math.log(10000.0) * torch.arange(half, dtype=torch.float32) / half)
    tables = {f"rope.{name}": table for name, table in rotary_tables(a).items()}
    return {
        **tables,
        "condition_embedder.frequencies": frequencies,
        "ones": torch.ones(a.inner_dim),
    }
