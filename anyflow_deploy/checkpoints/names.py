"""Bring parameter names to those of diffusers, where wrappers put something before them.

torch.compile, FSDP, DDP, trainers and pipelines save a network as a part of something: every name
then begins with `_orig_mod.`, `module.`, `model.` or `transformer.`. What all names share, and no
parameter of ours begins with, says nothing.
"""

from __future__ import annotations

from collections.abc import Iterable

WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
"""Parts of a name that torch's wrappers insert, at the front or in the middle."""

ROOTS = frozenset(
    (
        "blocks",
        "condition_embedder",
        "far_patch_embedding",
        "norm_out",
        "patch_embedding",
        "proj_out",
        "rope",
        "scale_shift_table",
    )
)
"""What the names of the transformer's own parameters begin with."""


def strip_prefixes(names: Iterable[str]) -> tuple[dict[str, str], str]:
    """Strip what wrappers added to parameter names.

    Args:
        names: all names of a checkpoint.

    Returns:
        Each name -> the one without it, and what was stripped, for a notice; empty where nothing
        was.
    """
    parts = {name: name.split(".") for name in names}
    stripped = []
    for wrapper in WRAPPERS:
        if any(wrapper in path for path in parts.values()):
            parts = {n: [part for part in path if part != wrapper] for n, path in parts.items()}
            stripped.append(f"{wrapper}.")
    while len(first := {path[0] for path in parts.values()}) == 1 and not first & ROOTS:
        if any(len(path) == 1 for path in parts.values()):
            break
        parts = {name: path[1:] for name, path in parts.items()}
        stripped.append(f"{first.pop()}.")
    result = {name: ".".join(path) for name, path in parts.items()}
    if len(set(result.values())) < len(result):  # two names became one: they were no wrappers'
        return {name: name for name in result}, ""
    return result, ", ".join(stripped)
