"""What a device can do that has a runtime and numpy, and no PyTorch: the commands, not only the
library."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from anyflow_deploy import Bundle

BARE = """
import sys
class Bare:
    def find_spec(self, name, path=None, target=None):
        top = name.split(".")[0]
        if top in {"torch", "diffusers", "transformers", "huggingface_hub", "av", "matplotlib"}:
            raise ModuleNotFoundError(f"No module named {top!r}", name=top)
sys.meta_path.insert(0, Bare())
from anyflow_deploy.cli import export, generate, profile_bundle, validate
commands = {
    "export": export, "generate": generate, "profile": profile_bundle, "validate": validate
}
commands[sys.argv.pop(1)].main()
"""


def bare(*words: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", BARE, *map(str, words)], capture_output=True, text=True, check=False
    )


@pytest.fixture
def embeddings(tmp_path: Path) -> Path:
    path = tmp_path / "fox.safetensors"
    save_file(
        {"prompt_embeds": np.random.default_rng(0).standard_normal((2, 8, 64)).astype(np.float32)},
        path,
    )
    return path


def test_embeddings_become_latents_without_pytorch(
    tiny_bundle: Bundle, embeddings: Path, tmp_path: Path
) -> None:
    output = tmp_path / "z.safetensors"
    size = ("--steps", 1, "--frames", 5, "--height", 32, "--width", 32)
    done = bare(
        "generate", tiny_bundle.path, "--prompt-embeds", embeddings, *size, "--output", output
    )
    assert done.returncode == 0, done.stderr
    assert load_file(output)["latents"].shape == (2, 2, 16, 4, 4)


def test_a_bundle_is_profiled_without_pytorch(tiny_bundle: Bundle, tmp_path: Path) -> None:
    output = tmp_path / "profile.json"
    done = bare(
        "profile",
        tiny_bundle.path,
        "--shapes",
        "32x32x5",
        "--steps",
        1,
        "--rounds",
        2,
        "--seconds",
        1,
        "--json",
        output,
    )
    assert done.returncode == 0, done.stderr
    made = json.loads(output.read_text())
    assert made["points"][0]["transition"]["count"] == 2 and made["layers"]
    assert all(
        "pip install 'anyflow-deploy[export]'" in made["absent"][part]
        for part in ("text encoder", "VAE")
    )


def test_two_prompts_do_not_become_one_video(
    tiny_bundle: Bundle, embeddings: Path, tmp_path: Path
) -> None:
    from anyflow_deploy.cli.generate import GenerateOptions, generate
    from anyflow_deploy.errors import AnyFlowError

    with pytest.raises(AnyFlowError, match="holds 2 prompts, and .*fox.mp4 takes one video"):
        generate(
            GenerateOptions(
                bundle=tiny_bundle.path, prompt_embeds=embeddings, output=tmp_path / "fox.mp4"
            )
        )


@pytest.mark.parametrize(
    "words",
    [
        ("validate", "BUNDLE"),
        ("generate", "BUNDLE", "--prompt", "x"),
        ("export", "--model", "1.3b"),
    ],
)
def test_what_needs_more_says_what_to_install(tiny_bundle: Bundle, words: tuple[str, ...]) -> None:
    done = bare(*(str(tiny_bundle.path) if word == "BUNDLE" else word for word in words))
    assert done.returncode == 1
    assert "not installed. Run: pip install 'anyflow-deploy[export]'" in done.stderr.replace(
        "\n", " "
    )
    assert "Traceback" not in done.stderr
