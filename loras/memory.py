"""The memory that this process may use, by the machine, the control groups that it is in, and Slurm."""

from __future__ import annotations

import os
from pathlib import Path


def host_memory() -> int:
    """Return the bytes of memory that this process may have on its machine, used or not."""
    return min([os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), *_group_limits(), *_slurm_limits()])


def _group_limits() -> list[int]:
    """Return the bytes that the control groups of this process may take (Linux, versions 1 and 2)."""
    table, root, limits = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup"), []
    for line in table.read_text().splitlines() if table.exists() else []:
        _, kinds, inside = line.split(":", 2)
        if kinds in ("", "memory"):
            root_of_kind, name = (root, "memory.max") if not kinds else (root / "memory", "memory.limit_in_bytes")
            group = root_of_kind / inside.lstrip("/")
            bounds = [folder / name for folder in (group, *group.parents)]
            texts = [bound.read_text().strip() for bound in bounds if bound.exists()]
            limits += [int(text) for text in texts if text.isdecimal()]
    return limits


def _slurm_limits() -> list[int]:
    """Return the bytes that a job of Slurm was given, which not every cluster enforces by control groups."""
    megabytes = {
        name: int(value)
        for name in ("SLURM_MEM_PER_NODE", "SLURM_MEM_PER_CPU", "SLURM_CPUS_ON_NODE")
        if (value := os.environ.get(name, "")).isdecimal() and int(value) > 0  # 0: all that the node has
    }
    limits = [megabytes["SLURM_MEM_PER_NODE"]] if "SLURM_MEM_PER_NODE" in megabytes else []
    if "SLURM_MEM_PER_CPU" in megabytes:
        limits.append(megabytes["SLURM_MEM_PER_CPU"] * megabytes.get("SLURM_CPUS_ON_NODE", 1))
    return [2**20 * limit for limit in limits]
