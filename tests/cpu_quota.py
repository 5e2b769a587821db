"""Limits the processor time of processes with a cgroup. Needs root."""

from pathlib import Path

import psutil

IS_V2 = Path("/sys/fs/cgroup/cgroup.controllers").exists()
ROOT = Path("/sys/fs/cgroup" if IS_V2 else "/sys/fs/cgroup/cpu")
PERIOD = 10_000  # microseconds; with long ones, a limited process answers late, which a slow one does not


class CpuQuota:
    """Limits a process, its children and their children to a share of one core while its `with` block runs.

    Args:
        process: with the children that it has now; those that they start later are limited too.
        share: of one core; 1: no limit.
    """

    def __init__(self, process: psutil.Process, share: float):
        self._folder = ROOT / f"forge-{process.pid}"
        self._folder.mkdir()
        self.set(share)
        for each in (process, *process.children(recursive=True)):
            (self._folder / "cgroup.procs").write_text(str(each.pid))

    def set(self, share: float) -> None:
        """Changes the share."""
        quota = int(PERIOD * share)
        if IS_V2:
            (self._folder / "cpu.max").write_text(f"{quota if share < 1 else 'max'} {PERIOD}")
        else:
            (self._folder / "cpu.cfs_period_us").write_text(str(PERIOD))
            (self._folder / "cpu.cfs_quota_us").write_text(str(quota if share < 1 else -1))

    def __enter__(self) -> "CpuQuota":
        return self

    def __exit__(self, *_: object) -> None:
        for line in (self._folder / "cgroup.procs").read_text().split():
            (ROOT / "cgroup.procs").write_text(line)
        self._folder.rmdir()
