"""Writes config.pbtxt, which describes a model to Triton, in protobuf's text form."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from anyflow_deploy.engines.tritonserver.io_spec import INPUTS, OUTPUTS, SINGLE_OUTPUTS, TensorSpec

_HEAD = """\
# Written by anyflow-triton. The parameters may be changed here; docs/how-to/triton.md
# says what they mean.
"""


def streaming_config(
    name: str,
    parameters: Mapping[str, str],
    gpus: Sequence[int] | None,
    embeds: tuple[int, int],
    warm_up: str,
    decoupled: bool = True,
) -> str:
    """Return the config.pbtxt of the model that makes videos.

    Args:
        name: of the model, and of its folder.
        parameters: from `Settings.as_parameters`.
        gpus: one instance on each; None for one on the CPU.
        embeds: tokens and channels of a prompt's embeddings, for the warm-up.
        warm_up: file below `warmup/` with the number of steps, INT32.
        decoupled: answer with a response for every chunk; else with one, the whole video.
    """
    kind = (
        "kind: KIND_CPU count: 1"
        if gpus is None
        else f"kind: KIND_GPU count: 1 gpus: {_list(gpus)}"
    )
    lines = [
        _HEAD,
        f"name: {_text(name)}",
        'backend: "python"',
        "max_batch_size: 0",
        f"model_transaction_policy {{ decoupled: {str(decoupled).lower()} }}",
        *_ports("input", INPUTS, optional=True),
        *_ports("output", OUTPUTS if decoupled else SINGLE_OUTPUTS),
        f"instance_group [ {{ {kind} }} ]",
        # The server is ready when it has generated one video. It is generated from embeddings,
        # which work with and without a text encoder.
        'model_warmup [ { name: "one video" batch_size: 1 count: 1',
        (
            f'  inputs {{ key: "prompt_embeds" value {{ data_type: TYPE_FP32 dims: {_list(embeds)}'
            " zero_data: true } }"
        ),
        (
            '  inputs { key: "num_inference_steps" value '
            f"{{ data_type: TYPE_INT32 dims: [ 1 ] input_data_file: {_text(warm_up)} }} }}"
        ),
        "} ]",
        *(
            f"parameters {{ key: {_text(key)} value {{ string_value: {_text(value)} }} }}"
            for key, value in parameters.items()
        ),
    ]
    return "\n".join(lines) + "\n"


def plan_config(
    name: str,
    inputs: Iterable[TensorSpec],
    outputs: Iterable[TensorSpec],
    gpus: Sequence[int],
    profiles: int,
) -> str:
    """Return the config.pbtxt of a bare TensorRT plan.

    Args:
        name: of the model, and of its folder.
        inputs, outputs: of the plan.
        gpus: one instance on each.
        profiles: how many optimization profiles the plan has; the server chooses the one that fits.
    """
    profile_names = ", ".join(f'"{number}"' for number in range(profiles))
    lines = [
        _HEAD,
        f"name: {_text(name)}",
        'platform: "tensorrt_plan"',
        "max_batch_size: 0",
        *_ports("input", inputs),
        *_ports("output", outputs),
        (
            f"instance_group [ {{ kind: KIND_GPU count: 1 gpus: {_list(gpus)}"
            f" profile: [ {profile_names} ] }} ]"
        ),
    ]
    return "\n".join(lines) + "\n"


def _ports(what: str, ports: Iterable[TensorSpec], optional: bool = False) -> list[str]:
    end = " optional: true" if optional else ""
    rows = [
        f"  {{ name: {_text(p.name)} data_type: TYPE_{p.type} dims: {_list(p.shape)}{end} }}"
        for p in ports
    ]
    return [f"{what} [", ",\n".join(rows), "]"]


def _list(numbers: Iterable[int]) -> str:
    return f"[ {', '.join(map(str, numbers))} ]"


def _text(value: str) -> str:
    return '"' + value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") + '"'
