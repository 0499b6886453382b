"""Prompts to embeddings, and embeddings to files.

Encoding is diffusers' own `AnyFlowPipeline.encode_prompt`, so the embeddings are those the model
was trained with: cleaned text, UMT5, padded with zeros. A file of embeddings is a .safetensors with
one tensor, `prompt_embeds` (B, L, D), float32, and the prompts in its header; it takes the place of
the text encoder on a small device.
"""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import numpy as np

from anyflow_deploy.bundle.atomic_io import write_bytes_atomically
from anyflow_deploy.bundle.outputs import OutputFile
from anyflow_deploy.checkpoints.float_arrays import FLOAT_TYPES, read_float32
from anyflow_deploy.checkpoints.safetensors_stream import read_header_and_metadata
from anyflow_deploy.engines.engine import Array
from anyflow_deploy.errors import AnyFlowError, CheckpointError

TENSOR = "prompt_embeds"
_MAKE_EMBEDDINGS = "Give a file that anyflow-generate --save-prompt-embeds FILE made."


class PromptEncoder:
    """Encodes prompts with a text encoder that is loaded once, when it is first needed.

    Any thread may call `check`, also while another one encodes; only one thread at a time may call
    `encode`.

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
        self._tokenizer = self._load_tokenizer()
        self._tokenizer_lock = threading.Lock()  # a tokenizer serves one thread at a time
        self._parts: Any = None

    def check(self, prompt: str, tokens: int) -> None:
        """Refuse a prompt that cannot be encoded in so many tokens.

        Raises:
            AnyFlowError: an empty prompt, or one that is too long; prompts are never cut.
        """
        if not prompt.strip():
            raise AnyFlowError("the prompt is empty; describe the video in a sentence.")
        with self._tokenizer_lock:
            length = len(self._tokenizer(prompt).input_ids)
        if length > tokens:
            raise AnyFlowError(
                f"the prompt has {length} tokens and the model takes {tokens}; shorten it."
            )

    def load(self) -> None:
        """Load the text encoder, unless it is loaded."""
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
        parts = {"tokenizer": self._load_tokenizer(), "text_encoder": encoder}
        self._parts = AnyFlowPipeline(**parts, transformer=None, vae=None, scheduler=None)

    def encode(self, prompts: list[str], tokens: int) -> Array:
        """Encode prompts: float32 (B, tokens, D), padded with zeros.

        Raises:
            AnyFlowError: an empty prompt, or one that is too long.
        """
        for prompt in prompts:
            self.check(prompt, tokens)
        return self._encode(prompts, tokens)

    def encode_empty(self, tokens: int) -> Array:
        """Encode the empty prompt, which guidance leads away from: float32 (1, tokens, D)."""
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

    def _load_tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self._pipeline / "tokenizer")


def encode_prompts(pipeline: Path, prompts: list[str], tokens: int) -> Array:
    """Encode prompts with an encoder that is loaded for this call: float32 (B, tokens, D).

    `PromptEncoder` stays loaded.

    Raises:
        AnyFlowError: an empty prompt, or one that is too long.
    """
    return PromptEncoder(pipeline).encode(prompts, tokens)


def save_embeddings(destination: Path | OutputFile, embeddings: Array, prompts: list[str]) -> None:
    """Write embeddings (B, L, D) and their prompts to a file, whole or not at all.

    Raises:
        OutputError: it cannot be written.
    """
    from safetensors.numpy import save

    data = save({TENSOR: embeddings}, metadata={"prompts": json.dumps(prompts)})
    write_bytes_atomically(destination, data)


def load_embeddings(path: Path) -> tuple[Array, list[str]]:
    """Read embeddings, float32 (B, L, D), and the prompts they came from.

    Every float type of safetensors is widened.

    Raises:
        AnyFlowError: not such a file, or one that may not be read.
    """
    try:
        entries, metadata = read_header_and_metadata(path)
        prompts = json.loads(metadata.get("prompts", "[]"))
    except (CheckpointError, ValueError, TypeError) as error:
        raise AnyFlowError(f"no prompt embeddings: {error} {_MAKE_EMBEDDINGS}") from None
    entry = entries.get(TENSOR)
    if entry is None or entry.type not in FLOAT_TYPES:
        problem = f"it holds {', '.join(sorted(entries)[:4]) or 'nothing'}"
        if entry is not None:
            problem = f"{TENSOR} is {entry.type}; allowed are {', '.join(FLOAT_TYPES)}"
        raise AnyFlowError(f"{path} holds no prompt embeddings ({problem}). {_MAKE_EMBEDDINGS}")
    return read_float32(path, entry), prompts
