"""Keeps the end of a distributed run from hanging."""

import atexit
import time

import torch

# Until the interpreter ends: see `keep_process_group`
_kept: list["torch.distributed.ProcessGroup"] = []


def keep_process_group() -> None:
    """
    Keep the default process group as a Python object until the interpreter ends; nothing without one.

    `torch.distributed.destroy_process_group` only lets go of a gloo group, and DistributedDataParallel then holds the last
    reference. It frees the group, and joins its threads, while it holds Python's global lock. A thread that has just
    finished a collective needs that lock to free the tensors of it: both wait for ever (torch 2.13; a few of a hundred
    runs, on busy cores, stood still behind their last line). Freed as a Python object, the group is joined without the lock.

    NCCL has no such threads, and is left alone.
    """
    distributed = torch.distributed
    if not distributed.is_available() or not distributed.is_initialized() or distributed.get_backend() == "nccl":
        return
    group = distributed.group.WORLD
    if group is None or any(group is kept for kept in _kept):
        return
    if not _kept:  # a thread that asks for the lock of an interpreter that is ending aborts the process
        atexit.register(time.sleep, 0.05)
    _kept.append(group)
