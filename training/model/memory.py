"""Estimates the memory of a training process, before anything is loaded.

Weights, gradients, optimizer and averages are counted exactly. Activations are an estimate that has
not been measured on a GPU: with gradient checkpointing, the residual stream of every layer
(float32) and one layer's worth of intermediate tensors.

Legend: N tokens that go through the network at once, D channels of the residual stream.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from anyflow_deploy.engines.kv_cache import fit_chunks
from anyflow_deploy.memory.parameter_shapes import count_parameters, parameter_shapes
from anyflow_deploy.models import Architecture
from anyflow_deploy.training.recipes import Recipe

LAYER_TABLES = 26
"""Tensors of N x D in float32 that one layer keeps for its backward pass, or computes in it:
modulated inputs, queries, keys, values before and after norm and rotation, results, and their
gradients. Counted, not measured."""

LORA_LAYERS = (
    r"blocks\.\d+\.(attn1\.to_[qkv]|attn1\.to_out\.0|ffn\.net\.0\.proj|ffn\.net\.2)\.weight"
)
LORA_TIMES = r"condition_embedder\.(time|delta)_embedder\.linear_[12]\.weight"


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes of one process.

    Attributes:
        weights: of all networks, frozen ones included.
        training: gradients, optimizer and moving averages.
        activations: of one micro-batch; see the module's text.
        layer_weights: one layer's whole weights, which FSDP gathers while it is computed.
    """

    weights: int
    training: int
    activations: int
    layer_weights: int

    @property
    def total(self) -> int:
        """The sum of all parts."""
        return self.weights + self.training + self.activations + self.layer_weights


def count_trained_parameters(recipe: Recipe, a: Architecture) -> int:
    """Count the numbers that are trained in one network."""
    shapes = parameter_shapes(a)
    rank = recipe.adapting.lora_rank
    if not rank:
        return sum(math.prod(shape) for shape in shapes.values())
    pattern = re.compile(
        f"{LORA_LAYERS}|{LORA_TIMES}" if recipe.adapting.lora_times else LORA_LAYERS
    )
    adapters = sum(
        rank * sum(shape[:2]) for name, shape in shapes.items() if pattern.fullmatch(name)
    )
    return adapters + sum(
        math.prod(shape) for name, shape in shapes.items() if name.startswith("far_patch")
    )


def estimate_training_memory(recipe: Recipe, a: Architecture, processes: int) -> TrainingMemory:
    """Estimate the memory of one process, with the weights sharded over `processes`."""
    number = count_parameters(a)
    element = 2 if recipe.running.compute == "bfloat16" else 4
    large = number["blocks"] + number["base"]
    small = number["float32"]
    has_adapters = recipe.adapting.lora_rank > 0
    trained_count = count_trained_parameters(recipe, a)
    learners = 2 if recipe.stage == "on-policy" else 1
    frozen = element * large + 4 * small
    networks = learners * (frozen + 4 * trained_count if has_adapters else 4 * trained_count) + (
        frozen if learners == 2 and not has_adapters else 0
    )
    # A gradient and two moments each, and one average
    training = learners * 12 * trained_count + 4 * trained_count
    layer = large // a.num_layers
    return TrainingMemory(
        weights=networks // processes,
        training=training // processes,
        activations=_activation_bytes(recipe, a, element),
        layer_weights=(element if has_adapters else 4 + element) * layer if processes > 1 else 0,
    )


def _activation_bytes(recipe: Recipe, a: Architecture, element: int) -> int:
    tokens = tokens_per_forward(recipe, a)
    layer_input = recipe.optimizing.micro_batch * 4 * tokens * a.inner_dim
    forwards = 3 if recipe.stage == "on-policy" else 1
    hidden = recipe.optimizing.micro_batch * 4 * element * tokens * a.ffn_dim
    layer = LAYER_TABLES * layer_input + hidden
    if recipe.running.checkpointing and recipe.running.offload:
        return layer_input + layer
    if recipe.running.checkpointing:
        return forwards * a.num_layers * layer_input + layer
    return forwards * a.num_layers * layer


def tokens_per_forward(recipe: Recipe, a: Architecture) -> int:
    """Return the tokens that keep activations in one forward.

    A causal model's clean copies and compressed chunks are included.
    """
    size = (recipe.height // a.patch_size[1]) * (recipe.width // a.patch_size[2])
    if a.full_chunk_limit is None or a.chunk_partition is None or a.compressed_patch_size is None:
        return recipe.frames * size
    chunks = fit_chunks(a.chunk_partition, recipe.frames)
    window = sum(chunks[-a.full_chunk_limit :])
    compressed = (recipe.height // a.compressed_patch_size[1]) * (
        recipe.width // a.compressed_patch_size[2]
    )
    if recipe.stage == "on-policy":
        return recipe.frames * size  # every chunk's transitions keep theirs
    return (2 * window - chunks[-1]) * size + (recipe.frames - window) * compressed


def checkpoint_bytes(recipe: Recipe, a: Architecture) -> int:
    """Return the bytes of one checkpoint: weights, two moments, and the average of the model."""
    learners = 2 if recipe.stage == "on-policy" else 1
    return 4 * count_trained_parameters(recipe, a) * (3 * learners + 1)


def model_bytes(recipe: Recipe, a: Architecture) -> int:
    """Return the bytes of the merged transformer."""
    return sum(math.prod(s) for s in parameter_shapes(a).values()) * (
        2 if recipe.running.save_type == "bfloat16" else 4
    )
