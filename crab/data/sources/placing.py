"""Media of a raw set put where the layout has them: linked or copied as they are, sound taken out of videos."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

from crab.data import media
from crab.data.files import atomic_file
from crab.data.sources.raw import AUDIO, SourceError

LINKS = ("hardlink", "symlink", "copy")


def place(source: Path, target: Path, link: str = "hardlink") -> None:
    """Put one file in place; what is there already, and no older, is kept.

    A file that is to be sound but comes from a video is decoded once to 16-bit PCM, 16 kHz mono, which is all that a
    model is given; nothing else is decoded or encoded.

    Raises:
        SourceError: the file cannot be linked.
        MediaError: the video has no sound, or cannot be decoded.
    """
    if target.suffix.lower() in AUDIO and source.suffix.lower() not in AUDIO:
        if not (target.is_file() and target.stat().st_mtime >= source.stat().st_mtime):
            media.write_audio(target, media.read_audio(source))
        return
    if target.exists() and (target.samefile(source) if link != "copy" else target.stat().st_size == source.stat().st_size):
        return
    with atomic_file(target) as part:
        try:
            if link == "copy":
                shutil.copy2(source, part)
            elif link == "symlink":
                part.symlink_to(source.resolve())
            else:
                os.link(source.resolve(), part)
        except OSError as error:
            if error.errno not in (errno.EXDEV, errno.EPERM, errno.EOPNOTSUPP, errno.EMLINK):
                raise
            raise SourceError(f"{source}: cannot be hard-linked to {target.parent} ({error.strerror}); convert to a root on the set's "
                              "own file system, or call crab.data.sources.convert_all with link='symlink' or link='copy'") from error
