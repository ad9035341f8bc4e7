"""The barrier of a persistent launch: programs of a group meet once a step.

Each group has a counter, zero when the launch starts, that only grows. The launch must be cooperative: all of its programs
run at once, or one that waits would keep out the one it waits for. The interpreter runs programs one after another: it is
given launches of one step, which have no barrier.

Why a value stored before `arrive` is what another program loads after `wait`:
    1. the CTA barrier puts every thread's stores before the one thread's atomic (bar.sync orders within the CTA);
    2. that atomic releases at gpu scope, which is cumulative: it covers the stores that (1) put before it;
    3. the waiting thread's atomic acquires at gpu scope, and drops the L1 lines of its multiprocessor;
    4. the CTA barrier puts every other thread's loads after (3).
What programs exchange is loaded past L1 all the same (`.cg`), so no step depends on (3) alone.

No program waits for ever. One that has polled too often adds so much to the counter that nobody of its group waits again, and
says so in a word that the host looks at before the next launch (launch.py). What such a launch computed is wrong.
"""

from __future__ import annotations

import triton
import triton.language as tl

PATIENCE = tl.constexpr(1 << 28)  # polls: some minutes, as each is a trip to L2 of half a microsecond or more
RELEASED = tl.constexpr(1 << 48)  # more than any target; a few thousand programs may add it to one counter


@triton.jit
def arrive(counter):
    """Count this program in; what it has stored is published."""
    tl.debug_barrier()
    tl.atomic_add(counter, 1, sem="release", scope="gpu")


@triton.jit
def wait(counter, target, gave_up, POLLS: tl.constexpr = PATIENCE):
    """Return when `target` arrivals are counted, and what was stored before them can be loaded; or after so many polls."""
    polls = 0
    while (tl.atomic_add(counter, 0, sem="acquire", scope="gpu") < target) & (polls < POLLS):
        polls += 1
    if polls == POLLS:
        tl.atomic_add(counter, RELEASED, sem="relaxed", scope="gpu")
        tl.store(gave_up, 1)
    tl.debug_barrier()


@triton.jit(do_not_specialize=["rounds"])
def meet(counter, stored, wrong, gave_up, rounds, POLLS: tl.constexpr):
    """All programs of the launch meet `rounds` times, and look each time at what another one stored before.

    stored [rounds, programs] and wrong [1], int32: the second counts what did not arrive. counter, gave_up: as above.
    """
    program, programs = tl.program_id(0), tl.num_programs(0)
    for i in range(rounds):
        tl.store(stored + i * programs + program, program + i + 1)
        arrive(counter)
        wait(counter, (i + 1) * programs.to(tl.int64), gave_up, POLLS)
        other = (program + i + 1) % programs
        if tl.load(stored + i * programs + other, cache_modifier=".cg") != other + i + 1:
            tl.atomic_add(wrong, 1)
