"""Kernels with what they are started with, and how the host learns that the programs of one gave up waiting for each other."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from . import selftest


@dataclass(frozen=True)
class Launch:
    """A kernel with everything it is started with."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    options: dict[str, Any]

    def run(self) -> None:
        self.kernel[self.grid](**self.arguments, **self.options)


class Alarm:
    """A word in which a program says that it gave up at a barrier.

    word: int32 [1] in pinned memory of the host's, which kernels write to. So looking at it waits for nothing and copies
    nothing; a launch that runs while it is looked at is found at the next look.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self._host = device, None
        if device.type == "meta":
            self.word = torch.empty(1, dtype=torch.int32, device="meta")
            return
        self.word = torch.zeros(1, dtype=torch.int32, pin_memory=device.type == "cuda")
        self._host = ctypes.c_int32.from_address(self.word.data_ptr())

    def rang(self) -> bool:
        """Did a program give up since the last look?"""
        if self._host is None or not self._host.value:
            return False
        self._host.value = 0
        return True

    def check(self) -> None:
        """Raise where an earlier launch gave up, and have the device do without such launches from now on.

        Raises:
            RuntimeError: it did.
        """
        if self.rang():
            selftest.switch_off(self.device, "persistent", "in an earlier call programs waited for each other in vain")
            raise RuntimeError(
                f"fastrnn: in an earlier call on {self.device}, programs of a persistent launch waited minutes for each other, "
                "and gave up: what that call returned is wrong. This process uses no persistent launches from now on."
            )


@cache
def alarm(device: torch.device) -> Alarm:
    """The alarm of a device."""
    return Alarm(device)
