"""Freed memory comes back without page faults while training, and goes home afterwards.

Measured in a process of its own: what other tests have left in the heap decides whether a large
block finds room there.
"""

import gc
import multiprocessing
import resource
import sys
from pathlib import Path

import pytest
import torch

from fifa.train.memory import keep_freed_memory

NUMBERS = 25_000_000  # 100 MB
LINUX = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="glibc's allocator is Linux's"
)


def faults(function):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    function()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def used_again_inside_the_block_only():
    def step():
        torch.ones(NUMBERS)

    step()
    outside = faults(step)
    before = resident()
    with keep_freed_memory():
        step()
        inside = faults(step)
        kept = resident()
    gc.collect()
    assert outside > 10 * max(inside, 1), (outside, inside)
    assert kept - before > 90e6 > 50e6 > resident() - before
    assert faults(step) > 10 * max(inside, 1)


def ended_by_an_error():
    before = resident()
    with pytest.raises(KeyError), keep_freed_memory():
        torch.ones(NUMBERS)
        kept = resident()
        raise KeyError
    assert kept - before > 90e6 > 50e6 > resident() - before


@LINUX
@pytest.mark.parametrize("measured", [used_again_inside_the_block_only, ended_by_an_error])
def test_freed_memory_is_kept_inside_the_block_only(measured):
    process = multiprocessing.get_context("spawn").Process(target=measured)
    process.start()
    process.join(120)
    assert process.exitcode == 0
