"""An engine where diffusers expects its transformer.

    pipe = AnyFlowPipeline.from_pretrained("checkpoint", transformer=None)
    pipe.transformer = EngineTransformer(load_engine("bundle"))
    video = pipe("a red fox in the snow", num_inference_steps=4).frames[0]

diffusers' pipeline keeps its own loop, scheduler, callbacks and guidance and asks the transformer for velocities; the
engine's graph gives the velocity beside z_r, so nothing is computed back from a difference.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from diffusers.configuration_utils import FrozenDict
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor, nn

from anyflow_deploy.engines.engine import BundleEngine
from anyflow_deploy.errors import AnyFlowError


class EngineTransformer(nn.Module):
    """Looks like `AnyFlowTransformer3DModel` to a pipeline and runs on an engine.

    It has no parameters: moving or casting it does nothing, LoRA cannot be loaded into it, and its results come back on
    the device and in the type of `hidden_states`.

    Args:
        engine: from `load_engine`.
    """

    def __init__(self, engine: BundleEngine) -> None:
        super().__init__()
        self.engine = engine
        self.config = FrozenDict(engine.bundle.manifest.architecture.as_config())

    @property
    def dtype(self) -> torch.dtype:
        """The type pipelines give their latents: float32, whatever the engine's precision."""
        return torch.float32

    @property
    def device(self) -> torch.device:
        """Where pipelines keep their latents."""
        return torch.device("cpu")

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
        """The average velocity, with diffusers' arguments.

        diffusers' pipeline sets t of conditioning frames to 0 and leaves their r at the step's target; a flow map is
        defined for r <= t, so r is limited by t here. Those frames' velocity is not used.

        Args:
            hidden_states: z_t, (B, F, C, H, W).
            timestep, r_timestep: (B, F), 0 to 1000.
            encoder_hidden_states: prompt embeddings (B, L, D).
            encoder_hidden_states_image, attention_kwargs: must be empty.

        Raises:
            AnyFlowError: an argument the exported graph has no input for.
            ShapeError: shapes outside the bundle's ranges.
        """
        if encoder_hidden_states_image is not None or attention_kwargs:
            raise AnyFlowError("an engine takes no image embeddings and no attention_kwargs (LoRA): export a merged model.")
        latents, text = _array(hidden_states), _array(encoder_hidden_states)
        source = _array(timestep)
        with self.engine.start(latents, text) as run:
            velocity = run.velocity(source, np.minimum(_array(r_timestep), source))
        output = torch.from_numpy(velocity).to(hidden_states)
        return Transformer2DModelOutput(sample=output) if return_dict else (output,)


def _array(tensor: Tensor) -> Any:
    return tensor.detach().to("cpu", torch.float32).numpy()
