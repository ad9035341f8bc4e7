"""The directory in which fastrnn keeps what took time to find out: machine code, and what self-tests of GPUs say."""

from __future__ import annotations

import os
import stat
import tempfile
from pathlib import Path


def cache_path() -> Path:
    """Name the directory: FASTRNN_CACHE_DIR, or else ~/.cache/fastrnn."""
    return Path(os.environ.get("FASTRNN_CACHE_DIR") or Path.home() / ".cache" / "fastrnn")


def cache_directory() -> Path:
    """Make `cache_path`, or a temporary directory where that one is not to be had or others can write to it."""
    base = cache_path()
    try:
        base.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = base.stat()
        # Windows has neither owners nor modes of this kind
        if not hasattr(os, "getuid") or (status.st_uid == os.getuid() and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)):
            return base
    except OSError:
        pass
    return Path(tempfile.mkdtemp(prefix="fastrnn-"))
