"""The memory of a process: measured, and limited for a while."""

import pytest
import torch

from fedexperts.errors import UserError
from fedexperts.process_memory import MemoryGuard, PeakMemory, anonymous_bytes, return_freed_memory

LARGE = 100_000_000


def own_bytes():
    """Memory of this process without what earlier tests freed, which a turn gives back before it begins."""
    return_freed_memory()
    return anonymous_bytes()


def test_a_peak_is_remembered_when_its_memory_is_free_again():
    before = anonymous_bytes()
    with PeakMemory() as peak:
        block = torch.ones(LARGE, dtype=torch.uint8)
        peak.look()
        del block
        return_freed_memory()
    assert peak.bytes - before > 0.9 * LARGE


def test_an_allocation_above_the_limit_is_refused_in_a_sentence_and_possible_afterwards():
    guard = MemoryGuard(own_bytes(), {"a": LARGE // 4})
    sentence = r"its process was refused more memory at .* MB, but its limit is 27\.5 MB, 1\.1 times"
    with guard.measured(), pytest.raises(UserError, match=sentence), guard.confined("a"):
        torch.ones(LARGE, dtype=torch.uint8)
    with guard.measured():
        torch.ones(LARGE, dtype=torch.uint8)


def test_python_s_own_lack_of_memory_counts_too():
    guard = MemoryGuard(own_bytes(), {"a": LARGE // 4})
    with guard.measured(), pytest.raises(UserError, match="refused more memory"), guard.confined("a"):
        bytearray(LARGE)


def test_a_peak_above_the_limit_is_refused_however_it_came_about():
    guard = MemoryGuard(0, {"a": 1})
    with guard.measured(), pytest.raises(UserError, match=r"its process took .* MB"), guard.confined("a"):
        pass
    assert guard.peak_bytes > 1


def test_without_a_limit_nothing_is_refused():
    guard = MemoryGuard(0, {"a": 0})
    for client_id in ("a", "b"):
        with guard.confined(client_id):
            torch.ones(LARGE, dtype=torch.uint8)
    assert guard.peak_bytes == 0


def test_another_error_stays_what_it_is():
    guard = MemoryGuard(anonymous_bytes(), {"a": LARGE})
    with pytest.raises(RuntimeError, match="another"), guard.confined("a"):
        raise RuntimeError("another")
