"""What an engine achieved on this GPU: read at its first opening there, since plans are built
without a GPU, and kept beside its kernels.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import Field

from anyflow_deploy.bundle.atomic_io import write_text_atomically
from anyflow_deploy.bundle.bundle import Bundle
from anyflow_deploy.bundle.json_records import FrozenRecord, RecordFormat
from anyflow_deploy.engines.tensorrt.build.achieved import add_graph, inspect_layers
from anyflow_deploy.engines.tensorrt.build.inspector import PrecisionReport
from anyflow_deploy.engines.tensorrt.plan import LoadedPlan
from anyflow_deploy.errors import AnyFlowError

_log = logging.getLogger("anyflow_deploy.tensorrt")
SCHEMA = 1


class AchievedRecord(FrozenRecord):
    """What is kept.

    Args:
        achieved: as in `EngineRecord`.
        shortfall: what was asked for and not achieved, in words; None: nothing.
    """

    schema_version: int = Field(default=SCHEMA, alias="schema")
    achieved: dict[str, Any]
    shortfall: str | None


_REMEDY = "The precision is read from the engine again."
_FORMAT = RecordFormat(AchievedRecord, SCHEMA, "record of achieved precision", _REMEDY)


def read_achieved(path: Path, bundle: Bundle, plans: Mapping[str, LoadedPlan]) -> AchievedRecord:
    """Return what opened plans hold.

    Args:
        path: where it is kept; written if it is not there, or cannot be read.
        bundle: the engine's.
        plans: by graph.
    """
    kept = _load(path)
    if kept is not None:
        return kept
    report = PrecisionReport()
    for graph, plan in plans.items():
        add_graph(report, bundle, graph, inspect_layers(plan.engine))
    record = AchievedRecord(achieved=report.record(), shortfall=report.shortfall)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text_atomically(path, record.model_dump_json(indent=1, by_alias=True) + "\n")
    except OSError as error:
        _log.warning("%s could not be written (%s); it is read again next time.", path, error)
    return record


def _load(path: Path) -> AchievedRecord | None:
    try:
        return _FORMAT.parse(path.read_bytes(), path)
    except FileNotFoundError:
        return None
    except (AnyFlowError, OSError) as error:
        _log.warning("%s", error)
        return None
