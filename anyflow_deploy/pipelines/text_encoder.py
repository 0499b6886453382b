"""Prompts to embeddings, and embeddings to files.

Encoding is diffusers' own `AnyFlowPipeline.encode_prompt`, so the embeddings are those the model
was trained with: cleaned text, UMT5, padded with zeros. A file of embeddings is a .safetensors with
one tensor, `prompt_embeds` (B, L, D), float32, and the prompts in its header; on a device it stands
in for the text encoder.
"""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import numpy as np

from anyflow_deploy.bundle.atomic_io import atomic_file
from anyflow_deploy.engines.engine import Array
from anyflow_deploy.errors import AnyFlowError

TENSOR = "prompt_embeds"


class PromptEncoder:
    """Encodes prompts with a text encoder that is loaded once, when it is first needed.

    `check` may be called from any thread, also while another one encodes; `encode` by one at a
    time.

    Args:
        pipeline: folder with tokenizer/ and text_encoder/.
        device: where it runs, as torch names it.

    Attributes:
        width: D of the embeddings.
    """

    def __init__(self, pipeline: Path, device: str = "cpu") -> None:
        from transformers import UMT5Config

        self.width = int(UMT5Config.from_pretrained(pipeline / "text_encoder").d_model)
        self._pipeline, self._device = pipeline, device
        self._counter = self._tokenizer()
        self._counting = threading.Lock()  # a tokenizer serves one thread at a time
        self._parts: Any = None

    def check(self, prompt: str, tokens: int) -> None:
        """Refuse what cannot be encoded in so many tokens.

        Raises:
            AnyFlowError: an empty prompt, or one that is too long; it is not cut.
        """
        if not prompt.strip():
            raise AnyFlowError("the prompt is empty; describe the video in a sentence.")
        with self._counting:
            length = len(self._counter(prompt).input_ids)
        if length > tokens:
            raise AnyFlowError(
                f"the prompt has {length} tokens and the model takes {tokens}; shorten it."
            )

    def load(self) -> None:
        """Load the text encoder now, if that has not happened."""
        if self._parts is not None:
            return
        from diffusers import AnyFlowPipeline
        from transformers import UMT5EncoderModel
        from transformers.utils import logging

        logging.disable_progress_bar()
        folder = self._pipeline / "text_encoder"
        encoder = (
            UMT5EncoderModel.from_pretrained(folder, dtype="auto", use_safetensors=True)
            .eval()
            .to(self._device)
        )
        parts = {"tokenizer": self._tokenizer(), "text_encoder": encoder}
        self._parts = AnyFlowPipeline(**parts, transformer=None, vae=None, scheduler=None)

    def encode(self, prompts: list[str], tokens: int) -> Array:
        """As `encode_prompts`."""
        for prompt in prompts:
            self.check(prompt, tokens)
        return self._encode(prompts, tokens)

    def nothing(self, tokens: int) -> Array:
        """The empty prompt's embedding, float32 (1, tokens, D): what guidance leads away from."""
        return self._encode([""], tokens)

    def _encode(self, prompts: list[str], tokens: int) -> Array:
        import torch

        self.load()
        with torch.no_grad():
            embeddings, _ = self._parts.encode_prompt(
                prompts,
                do_classifier_free_guidance=False,
                max_sequence_length=tokens,
                device=torch.device(self._device),
            )
        return np.array(embeddings.float().cpu().numpy(), dtype=np.float32)

    def _tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self._pipeline / "tokenizer")


def encode_prompts(pipeline: Path, prompts: list[str], tokens: int) -> Array:
    """Embeddings of prompts, float32 (B, tokens, D); see `PromptEncoder`, which stays loaded.

    Raises:
        AnyFlowError: an empty prompt, or one that is too long.
    """
    return PromptEncoder(pipeline).encode(prompts, tokens)


def save_embeddings(path: Path, embeddings: Array, prompts: list[str]) -> None:
    """Write embeddings, whole or not at all."""
    from safetensors.numpy import save_file

    with atomic_file(path) as partial:
        save_file({TENSOR: embeddings}, partial, metadata={"prompts": json.dumps(prompts)})


def load_embeddings(path: Path) -> tuple[Array, list[str]]:
    """Read embeddings and the prompts they came from.

    Raises:
        AnyFlowError: not such a file.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            return np.array(file.get_tensor(TENSOR), dtype=np.float32), json.loads(
                metadata.get("prompts", "[]")
            )
    except (OSError, SafetensorError, ValueError) as error:
        raise AnyFlowError(
            f"{path} holds no prompt embeddings ({error}). Make such a file with anyflow-generate"
            " --save-prompt-embeds FILE."
        ) from None
