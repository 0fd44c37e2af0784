"""Threads together stay within the limit."""

from __future__ import annotations

import threading

from hpsearch.data.decode import MemoryGate


def hold_one(gate: MemoryGate) -> None:
    with gate.admitted(1):
        pass


def test_what_exceeds_the_limit_alone_gets_in_alone() -> None:
    gate = MemoryGate(100)
    with gate.admitted(500):
        waiting = threading.Thread(target=hold_one, args=(gate,))
        waiting.start()
        waiting.join(0.05)
        assert waiting.is_alive()
    waiting.join(10)
    assert not waiting.is_alive()


def test_what_fits_gets_in_together_and_what_exceeds_waits_for_room() -> None:
    gate = MemoryGate(100)
    let_go, held = threading.Event(), threading.Barrier(3)

    def hold(n_bytes: int) -> None:
        with gate.admitted(n_bytes):
            held.wait(10)
            let_go.wait(10)

    holders = [threading.Thread(target=hold, args=(n_bytes,)) for n_bytes in (60, 40)]
    for each in holders:
        each.start()
    # Raises if one of them had to wait for the other.
    held.wait(5)
    waiting = threading.Thread(target=hold_one, args=(gate,))
    waiting.start()
    waiting.join(0.05)
    assert waiting.is_alive()
    let_go.set()
    for each in (*holders, waiting):
        each.join(10)
        assert not each.is_alive()
