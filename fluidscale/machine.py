"""What of this machine a process may use: cores and memory, capped by its container. Imports no torch."""

from __future__ import annotations

import os
from pathlib import Path


def available_cores() -> int:
    """CPUs this process may use: its affinity, capped by the control group's quota (containers)."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota, period = (_control("cpu.max") or f"{_control('cpu/cpu.cfs_quota_us') or 'max'} 100000").split()
    limited = quota.isdigit() and period.isdigit()
    return max(1, min(cores, int(quota) // int(period))) if limited else cores


def available_memory_gb() -> float:
    """Memory of this machine in GB, capped by the control group's limit."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = _control("memory.max") or _control("memory/memory.limit_in_bytes")
    return min(total, int(limit) if limit.isdigit() else total) / 1e9


def _control(name: str) -> str:
    """A limit of the control group (version 2, then 1), empty where there is none."""
    try:
        return (Path("/sys/fs/cgroup") / name).read_text().strip()
    except OSError:
        return ""
