"""Openings: which files below a folder are opened. The kernel says so: libraries in Rust tell Python nothing."""

from __future__ import annotations

import ctypes
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_IN_OPEN = 0x20
_HEADER = struct.Struct("iIII")


@contextmanager
def openings(folder: Path) -> Iterator[list[str]]:
    """Names of what is opened while the block runs; they are there at its end."""
    libc = ctypes.CDLL(None, use_errno=True)
    found: list[str] = []
    watch = libc.inotify_init1(os.O_NONBLOCK)
    try:
        for place in [folder, *(below for below in folder.rglob("*") if below.is_dir())]:
            assert libc.inotify_add_watch(watch, os.fsencode(place), _IN_OPEN) > 0, os.strerror(ctypes.get_errno())
        yield found
        with suppress(BlockingIOError):
            while events := os.read(watch, 1 << 20):
                at = 0
                while at < len(events):
                    *_, length = _HEADER.unpack_from(events, at)
                    at += _HEADER.size + length
                    found.append(os.fsdecode(events[at - length : at].rstrip(b"\0")))
    finally:
        os.close(watch)
