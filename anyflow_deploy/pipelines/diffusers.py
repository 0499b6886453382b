"""An engine in the place of the transformer in diffusers' pipelines.

    pipe = AnyFlowPipeline.from_pretrained("checkpoint", transformer=None)
    pipe.transformer = EngineTransformer(load_engine("bundle"))
    video = pipe("a red fox in the snow", num_inference_steps=4).frames[0]
    pipe.save_pretrained("folder")  # with the bundle; from_pretrained("folder") opens it again

diffusers' pipeline keeps its own loop, scheduler, callbacks and guidance and calls the
transformer for velocities; the engine's graph returns the velocity beside z_r, so nothing is
computed back from a difference.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.configuration_utils import FrozenDict
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor

from anyflow_deploy.bundle.atomic_io import atomic_folder, link_or_copy, write_text_atomically
from anyflow_deploy.engines.engine import BundleEngine, Stream
from anyflow_deploy.engines.kv_cache import cache_plan
from anyflow_deploy.engines.registry import backend_of, load_engine
from anyflow_deploy.errors import AnyFlowError

ENGINE = "engine.json"
BUNDLE = "bundle"
"""What a saved transformer's folder has: which backend, and the bundle."""


class EngineTransformer(ModelMixin):  # type: ignore[misc]  # diffusers has no types
    """Looks like `AnyFlowTransformer3DModel` to a pipeline and runs on an engine.

    It has no parameters: moving or casting it does nothing, LoRA cannot be loaded into it, and its
    results come back on the device and in the type of `hidden_states`. It is one of diffusers'
    models, so that a pipeline saves and loads it.

    Args:
        engine: from `load_engine`.
    """

    def __init__(self, engine: BundleEngine) -> None:
        super().__init__()
        self.engine = engine
        self.config = FrozenDict(engine.bundle.manifest.architecture.as_config())

    @property
    def dtype(self) -> torch.dtype:
        """Type that pipelines give their latents: float32, whatever the engine's precision."""
        return torch.float32

    @property
    def device(self) -> torch.device:
        """Device on which pipelines keep their latents: the CPU."""
        return torch.device("cpu")

    def save_pretrained(self, save_directory: str | Path, **_: Any) -> None:
        """Save the bundle, as hard links where the file system allows it, and the backend's name.

        Args:
            save_directory: folder to create or fill; a bundle in it is replaced when the new one is
                complete. Other arguments of diffusers (variant, shard size, …) are about weights
                that are not there, and are ignored.
        """
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_folder(folder / BUNDLE) as partial:
            shutil.copytree(
                self.engine.bundle.path, partial, copy_function=link_or_copy, dirs_exist_ok=True
            )
        content = {"backend": backend_of(self.engine), "format": 1}
        write_text_atomically(folder / ENGINE, json.dumps(content, indent=1) + "\n")

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        backend: str | None = None,
        provider: str | None = None,
        **_: Any,
    ) -> EngineTransformer:
        """Open a saved transformer.

        Args:
            pretrained_model_name_or_path: folder that `save_pretrained` made.
            backend, provider: see `load_engine`; None for the backend that it was saved with. Other
                arguments of diffusers (dtype, device map, …) are about weights that are not there,
                and are ignored.

        Raises:
            AnyFlowError: the folder was made by something else, or the engine cannot be loaded.
        """
        folder = Path(pretrained_model_name_or_path)
        try:
            saved = json.loads((folder / ENGINE).read_text())["backend"]
        except (OSError, ValueError, KeyError, TypeError):
            raise AnyFlowError(
                f"{folder} has no readable {ENGINE}, so it is no saved engine. Give a folder that"
                f" {cls.__name__}.save_pretrained made, or load_engine a bundle."
            ) from None
        return cls(load_engine(folder / BUNDLE, backend or saved, provider))

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        r_timestep: Tensor,
        encoder_hidden_states: Tensor,
        encoder_hidden_states_image: Tensor | None = None,
        attention_kwargs: dict[str, Any] | None = None,
        return_dict: bool = True,
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """Compute the average velocity, with diffusers' arguments.

        diffusers' pipeline sets t of conditioning frames to 0 and leaves their r at the step's
        target; a flow map is defined for r <= t, so r is limited by t here. Those frames' velocity
        is not used.

        Args:
            hidden_states: z_t, (B, F, C, H, W).
            timestep, r_timestep: (B, F), 0 to 1000.
            encoder_hidden_states: prompt embeddings (B, L, D).
            encoder_hidden_states_image, attention_kwargs: must be empty.

        Raises:
            AnyFlowError: an argument that the exported graph does not take.
            ShapeError: shapes outside the bundle's ranges.
        """
        if encoder_hidden_states_image is not None or attention_kwargs:
            raise AnyFlowError(
                "an engine takes no image embeddings and no attention_kwargs (LoRA): export a"
                " merged model."
            )
        latents = _array(hidden_states)
        text = _array(encoder_hidden_states)
        source = _array(timestep)
        with self.engine.start(latents, text) as run:
            velocity = run.velocity(source, np.minimum(_array(r_timestep), source))
        output = torch.from_numpy(velocity).to(hidden_states)
        return Transformer2DModelOutput(sample=output) if return_dict else (output,)


class EngineFARTransformer(EngineTransformer):
    """Looks like `AnyFlowFARTransformer3DModel` to a pipeline and runs on a causal engine.

        pipe = AnyFlowFARPipeline.from_pretrained("checkpoint", transformer=None)
        pipe.transformer = EngineFARTransformer(load_engine("bundle"))

    The pipeline allocates a cache of its own and never reads it; the engine's streams, one for each
    batch item, are kept in that dictionary and end with it. Results differ from diffusers' own
    class where the tokens of a step are not a multiple of 128: there diffusers attends to padding,
    which is wrong (docs/how-to/streaming.md explains it).
    """

    def build_attention_mask(self, **_: Any) -> None:
        """Build no mask: a causal engine needs none."""

    def forward(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        r_timestep: Tensor,
        encoder_hidden_states: Tensor,
        chunk_partition: list[int],
        kv_cache: dict[Any, Any] | None = None,
        kv_cache_flag: dict[str, Any] | None = None,
        attention_mask: None = None,
        attention_kwargs: dict[str, Any] | None = None,
        return_dict: bool = False,
    ) -> tuple[Tensor | None, dict[Any, Any]]:
        """Denoise one chunk, or append it to the cache; the arguments are diffusers'.

        Args:
            hidden_states: z_t of the chunk (B, F, C, H, W); for a cache step, all latents so far.
            timestep, r_timestep: (B, F).
            encoder_hidden_states: prompt embeddings (B, L, D).
            chunk_partition: latent frames of every chunk up to this one.
            kv_cache, kv_cache_flag: of the pipeline.

        Raises:
            AnyFlowError: `use_kv_cache=False`, attention_kwargs, or shapes outside the bundle's
                ranges.
        """
        if kv_cache is None or kv_cache_flag is None:
            raise AnyFlowError("a causal engine always caches; leave use_kv_cache=True.")
        if attention_kwargs:
            raise AnyFlowError("an engine takes no attention_kwargs (LoRA): export a merged model.")
        # A cache step prepares for a chunk that chunk_partition does not name yet.
        next_chunk = [1] if kv_cache_flag["is_cache_step"] else []
        streams = self._streams(
            kv_cache,
            encoder_hidden_states,
            [*chunk_partition, *next_chunk],
            hidden_states.shape[3:],
        )
        latents = _array(hidden_states[:, -chunk_partition[-1] :])
        if kv_cache_flag["is_cache_step"]:
            for stream, item in zip(streams, latents, strict=True):
                stream.append(np.ascontiguousarray(item[None]))
            return None, kv_cache
        source = _array(timestep)
        target = np.minimum(_array(r_timestep), source)
        velocities = []
        for index, stream in enumerate(streams):
            with stream.start(np.ascontiguousarray(latents[index : index + 1])) as run:
                velocities.append(
                    run.velocity(source[index : index + 1], target[index : index + 1])
                )
        return torch.from_numpy(np.concatenate(velocities)).to(hidden_states), kv_cache

    def _streams(
        self, kv_cache: dict[Any, Any], text: Tensor, chunks: list[int], size: torch.Size
    ) -> list[Stream]:
        """Open the streams of a pipeline call at its first step, and extend them later."""
        height, width = size
        plan = cache_plan(
            self.engine.architecture, chunks, height, width, text_tokens=text.shape[1]
        )
        if "engine_streams" not in kv_cache:
            prompt_embeds = _array(text)
            kv_cache["engine_streams"] = [
                self.engine.open_stream(prompt_embeds[i : i + 1], plan)
                for i in range(len(prompt_embeds))
            ]
        streams: list[Stream] = kv_cache["engine_streams"]
        for stream in streams:
            stream.extend(plan)
        return streams


def _array(tensor: Tensor) -> Any:
    return tensor.detach().to("cpu", torch.float32).numpy()
