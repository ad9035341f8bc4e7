"""The barrier of a persistent launch: programs of a group meet once a step.

Each group has a counter, zero when the launch starts, that only grows. The launch must be cooperative: all of its programs
run at once, or one that waits would keep out the one it waits for. The interpreter runs programs one after another and
would never return from `wait`: it is given launches of one step, which have no barrier.

Why a value stored before `arrive` is what another program loads after `wait`:
    1. the CTA barrier puts every thread's stores before the one thread's atomic (bar.sync orders within the CTA);
    2. that atomic releases at gpu scope, which is cumulative: it covers the stores that (1) put before it;
    3. the waiting thread's atomic acquires at gpu scope, and drops the L1 lines of its multiprocessor;
    4. the CTA barrier puts every other thread's loads after (3).
What programs exchange is loaded past L1 all the same (`.cg`), so no step depends on (3) alone.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def arrive(counter):
    """Count this program in; what it has stored is published."""
    tl.debug_barrier()
    tl.atomic_add(counter, 1, sem="release", scope="gpu")


@triton.jit
def wait(counter, target):
    """Return when `target` arrivals are counted; what was stored before them can be loaded."""
    while tl.atomic_add(counter, 0, sem="acquire", scope="gpu") < target:
        pass
    tl.debug_barrier()
