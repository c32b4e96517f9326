"""Processes as the fault tests see them: who runs below whom, and who still runs."""

import time
from pathlib import Path


def descendants(pid: int) -> dict[int, str]:
    """Command lines of all processes below `pid`."""
    parents, names = {}, {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                stat = (entry / "stat").read_text()
                names[int(entry.name)] = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            except OSError:
                continue  # it ended meanwhile
            parents[int(entry.name)] = int(stat.rpartition(")")[2].split()[1])
    found: set[int] = {pid}
    while more := {child for child, parent in parents.items() if parent in found} - found:
        found |= more
    return {child: names[child] for child in found - {pid}}


def alive(pids: list[int]) -> list[int]:
    """Those that run; an ended process that nobody has waited for does not."""
    return [pid for pid in pids if _runs(pid)]


def wait_until_ended(pids: list[int], seconds: float = 60) -> None:
    """Fail if any of them still runs after so long."""
    deadline = time.monotonic() + seconds
    while alive(pids) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not alive(pids), f"{alive(pids)} outlived what they worked for"


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
