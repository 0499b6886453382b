"""The folder with the videos: one folder for each, bounded in size and age.

A video grows in `ID/video.mp4`. When it is whole, `ID/video.json` is written beside it, whole
or not at all: a folder with that file holds a finished video, which is served again after a
restart. All other folders were left by a killed server, and the next one removes them. A lock,
which ends with its process, lets only one server at a time use the folder.
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

from anyflow_deploy.bundle.atomic_io import write_text_atomically
from anyflow_deploy.bundle.renames import fsync_path
from anyflow_deploy.errors import AnyFlowError
from anyflow_deploy.serving.job import Fragment, Job, Video

VIDEO = "video.mp4"
RECORD = "video.json"
LOCK = ".anyflow-serve.lock"
_log = logging.getLogger("anyflow.serve")
NAME = re.compile(r"video_[0-9a-f]{32}")


class VideoRecord(BaseModel):
    """The contents of `video.json`."""

    schema_version: int = 1
    video: Video
    pieces: list[Fragment]


class VideoStore:
    """Stores the service's videos in a folder.

    Args:
        folder: created if it is missing.
        max_bytes: largest size of all finished videos together.
        keep_seconds: time after which a finished video is removed.

    Raises:
        AnyFlowError: a folder that cannot be written to, or that another server uses.
    """

    def __init__(self, folder: Path, max_bytes: int, keep_seconds: float) -> None:
        self.folder = folder
        self._max_bytes = max_bytes
        self._keep_seconds = keep_seconds
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
        """Release the folder for another server."""
        self._lock.close()

    def path(self, name: str) -> Path:
        """Return the path of a video's file, which need not exist yet."""
        return self.folder / name / VIDEO

    def begin(self, name: str) -> Path:
        """Create a video's folder; return the path of its file."""
        (self.folder / name).mkdir()
        return self.path(name)

    def finish(self, job: Job, video: Video) -> None:
        """Mark a video as whole, durably; `video` is what clients will see."""
        fsync_path(self.path(job.id))
        record = VideoRecord(video=video, pieces=job.fragments)
        write_text_atomically(self.folder / job.id / RECORD, record.model_dump_json(indent=1))

    def remove(self, name: str) -> None:
        """Remove a video, whole or partial; readers with an open file can continue."""
        folder = self.folder / name
        # The record goes first, so that a partly removed folder is never taken for a video.
        with contextlib.suppress(OSError):
            (folder / RECORD).unlink()
        shutil.rmtree(folder, ignore_errors=True)

    def restore(self) -> list[Job]:
        """Return the videos that earlier servers finished, oldest first; remove unfinished ones.

        A folder with a record that this version cannot read is left alone.
        """
        jobs = []
        for folder in self.folder.iterdir():
            if not NAME.fullmatch(folder.name) or folder.is_symlink() or not folder.is_dir():
                continue  # not ours
            if not (folder / RECORD).exists():
                self.remove(folder.name)
            elif job := _read_job(folder):
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

    def find_surplus(self, jobs: list[Job], now: float | None = None) -> list[Job]:
        """Return the finished videos that have to be removed, by age and by size.

        The newest one stays, however large it is.

        Args:
            jobs: finished videos, oldest first.
            now: Unix seconds; None for the time now.
        """
        moment = time.time() if now is None else now
        old = [job for job in jobs if moment - (job.video.completed_at or 0) > self._keep_seconds]
        remaining = [job for job in jobs if job not in old]
        total = sum(job.video.bytes or 0 for job in remaining)
        while len(remaining) > 1 and total > self._max_bytes:
            total -= remaining[0].video.bytes or 0
            old.append(remaining.pop(0))
        return old


def _lock_folder(path: Path) -> IO[bytes]:
    file = path.open("ab")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BaseException:
        file.close()
        raise
    return file


def _read_job(folder: Path) -> Job | None:
    """Read a finished video's record; None if the folder holds none."""
    try:
        record = VideoRecord.model_validate_json((folder / RECORD).read_bytes())
        size = (folder / VIDEO).stat().st_size
    except (OSError, ValidationError):
        return None
    is_whole = (
        record.schema_version == 1 and record.video.id == folder.name and record.video.bytes == size
    )
    return (
        Job(record.video, None, fragments=record.pieces)
        if is_whole and record.video.status == "completed"
        else None
    )
