"""Where the rows of a packed sequence lie, on its device: copied there when a stream first sees such batch_sizes, and kept.

A CUDA graph reads at its replay what lay at an address at its capture, and nothing may be copied from the CPU in between. So a
capture takes what a call before it has left here, which then stays as long as the process, on whatever stream the graph runs: a
capture begins when the device has done all. Other calls share it on one stream alone, whose order is enough.
"""

from __future__ import annotations

import ctypes
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

MOST = 1024  # of which rows are kept, the latest
_Key = tuple[bytes, int, int, torch.device]


class Rows(NamedTuple):
    """lengths: steps of each row [B]. offsets: rows before each step [T]. Both int64."""

    lengths: Tensor
    offsets: Tensor


_kept: dict[_Key, tuple[int, Rows]] = {}  # with the stream on which they were copied
_captured: dict[_Key, Rows] = {}  # those that graphs read


def capturing(device: torch.device) -> bool:
    """Does the current stream, which is one of this device's, record a CUDA graph?"""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def rows_of_steps(batch_sizes: Tensor, B: int, N: int, device: torch.device) -> Rows:
    """The rows of a sequence of B rows in the first step and N in all, whose batch_sizes [T] are int64 on the CPU.

    Raises:
        RuntimeError: the sizes do not fit each other, or a graph is captured that needs them before any call has.
    """
    sizes = batch_sizes.contiguous()
    key = ctypes.string_at(sizes.data_ptr(), sizes.nbytes), B, N, device
    if key in _captured:
        return _captured[key]
    stream = _stream(device)
    own, rows = _kept.get(key, (stream, None))
    if capturing(device):
        if rows is None:
            raise RuntimeError(
                "fastrnn: batch_sizes: a CUDA graph can only be captured of a packed sequence whose lengths a call had before: "
                "run once what is to be captured"
            )
        _captured[key] = rows
    elif rows is None or own != stream:
        with _disable_current_modes():  # a tape has no word for this, and needs none: it finds the rows where they are
            rows = _copied(batch_sizes, B, N, device)
        while len(_kept) >= MOST:
            _kept.pop(next(iter(_kept)), None)
        _kept[key] = stream, rows
    return rows


def _stream(device: torch.device) -> int:
    return torch._C._cuda_getCurrentRawStream(device.index) if device.type == "cuda" else 0


def _copied(batch_sizes: Tensor, B: int, N: int, device: torch.device) -> Rows:
    if bool((batch_sizes.diff() > 0).any()) or int(batch_sizes[-1]) <= 0:
        raise RuntimeError("fastrnn: batch_sizes must be positive and not increase")
    if int(batch_sizes[0]) != B or int(batch_sizes.sum()) != N:
        raise RuntimeError("fastrnn: batch_sizes do not fit x or the states")
    offsets = batch_sizes.cumsum(0) - batch_sizes
    lengths = len(batch_sizes) - torch.searchsorted(batch_sizes.flip(0), torch.arange(B), right=True)
    both = torch.cat((lengths, lengths.new_empty(B % 2), offsets))  # which start at multiples of 16 bytes
    if device.type == "cuda":
        both = both.pin_memory().to(device, non_blocking=True)
    return Rows(both[:B], both[B + B % 2 :])
