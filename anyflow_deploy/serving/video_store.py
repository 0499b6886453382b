"""The folder with the videos: one folder for each, bounded in size and age.

A video grows in `ID/video.mp4`. When it is whole, `ID/video.json` is written beside it, at once or
not at all: a folder that has one holds a finished video, and is served again after a restart. All
other folders are what a killed server left, and go when the next one opens the shelf. One server at
a time has a shelf; a lock that ends with its process sees to that.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import re
import shutil
import time
from pathlib import Path
from typing import IO

from pydantic import BaseModel, ValidationError

from anyflow_deploy.bundle.atomic_io import fsync_path, write_text_atomically
from anyflow_deploy.errors import AnyFlowError
from anyflow_deploy.serving.job import Fragment, Job, Video

VIDEO = "video.mp4"
RECORD = "video.json"
LOCK = ".anyflow-serve.lock"
_log = logging.getLogger("anyflow.serve")
NAME = re.compile(r"video_[0-9a-f]{32}")


class Stored(BaseModel):
    """`video.json`."""

    schema_version: int = 1
    video: Video
    pieces: list[Fragment]


class VideoStore:
    """See the module.

    Args:
        folder: made if it is not there.
        most_bytes: of all finished videos.
        keep_seconds: after which a finished one goes.

    Raises:
        AnyFlowError: not a folder that can be written to, or one that another server has.
    """

    def __init__(self, folder: Path, most_bytes: int, keep_seconds: float) -> None:
        self.folder = folder
        self._most = most_bytes
        self._keep = keep_seconds
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._lock = _lock_folder(folder / LOCK)
        except BlockingIOError:
            raise AnyFlowError(
                f"{folder} belongs to another anyflow-serve that runs. Choose another --folder."
            ) from None
        except OSError as error:
            raise AnyFlowError(
                f"{folder} cannot hold the videos: {error.strerror}. Choose another --folder."
            ) from None

    def close(self) -> None:
        """Let another server have it."""
        self._lock.close()

    def path(self, name: str) -> Path:
        """Where a video's file is, or will be."""
        return self.folder / name / VIDEO

    def begin(self, name: str) -> Path:
        """Make a video's folder; returns where its file goes."""
        (self.folder / name).mkdir()
        return self.path(name)

    def finish(self, job: Job, video: Video) -> None:
        """Say that a video is whole, for good; `video` is what clients will see of it."""
        fsync_path(self.path(job.id))
        stored = Stored(video=video, pieces=job.pieces)
        write_text_atomically(self.folder / job.id / RECORD, stored.model_dump_json(indent=1))

    def remove(self, name: str) -> None:
        """Remove a video, whole or half. Those who have its file open may read on."""
        folder = self.folder / name
        # First, so that what is left of it is never taken for a video
        with contextlib.suppress(OSError):
            (folder / RECORD).unlink()
        shutil.rmtree(folder, ignore_errors=True)

    def restore(self) -> list[Job]:
        """The videos that earlier servers finished, oldest first; clears away what they did not.

        A folder with a record that this version cannot read is left alone.
        """
        jobs = []
        for folder in self.folder.iterdir():
            if not NAME.fullmatch(folder.name) or folder.is_symlink() or not folder.is_dir():
                continue  # not ours
            if not (folder / RECORD).exists():
                self.remove(folder.name)
            elif job := _read(folder):
                jobs.append(job)
            else:
                _log.warning("%s is no video that this version can read; it is left alone", folder)
        return sorted(
            jobs,
            key=lambda job: (
                job.video.created_at,
                (self.folder / job.id / RECORD).stat().st_mtime_ns,
            ),
        )

    def surplus(self, finished: list[Job], now: float | None = None) -> list[Job]:
        """Which finished videos have to go, by age and by size; the newest one stays, however
        large.

        Args:
            finished: oldest first.
            now: Unix seconds, for tests.
        """
        moment = time.time() if now is None else now
        old = [job for job in finished if moment - (job.video.completed_at or 0) > self._keep]
        kept = [job for job in finished if job not in old]
        total = sum(job.video.bytes or 0 for job in kept)
        while len(kept) > 1 and total > self._most:
            total -= kept[0].video.bytes or 0
            old.append(kept.pop(0))
        return old


def _lock_folder(path: Path) -> IO[bytes]:
    file = path.open("ab")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BaseException:
        file.close()
        raise
    return file


def _read(folder: Path) -> Job | None:
    """A finished video, if this is one."""
    try:
        stored = Stored.model_validate_json((folder / RECORD).read_bytes())
        size = (folder / VIDEO).stat().st_size
    except (OSError, ValidationError):
        return None
    whole = (
        stored.schema_version == 1 and stored.video.id == folder.name and stored.video.bytes == size
    )
    return (
        Job(stored.video, None, pieces=stored.pieces)
        if whole and stored.video.status == "completed"
        else None
    )
