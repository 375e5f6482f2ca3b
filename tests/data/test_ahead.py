"""An iterator that a thread runs ahead."""

from __future__ import annotations

import threading
import time

import pytest

from megatron_nucleus.data.ahead import Ahead


def wait_for(condition, limit_s=5.0):
    until = time.monotonic() + limit_s
    while not condition() and time.monotonic() < until:
        time.sleep(0.005)
    assert condition()


def test_values_come_in_order_and_end():
    ahead = Ahead(iter(range(50)), 3)
    assert list(ahead) == list(range(50))
    assert list(ahead) == []
    ahead.close()


def test_it_runs_ahead_by_its_depth_and_no_further():
    made = []

    def values():
        for i in range(100):
            made.append((i, threading.current_thread().name))
            yield i

    ahead = Ahead(values(), 2)
    wait_for(lambda: len(made) == 3)  # two lie ready, one is in hand
    time.sleep(0.05)
    assert len(made) == 3
    assert next(ahead) == 0
    wait_for(lambda: len(made) == 4)
    assert {name for _, name in made} == {"data"}
    ahead.close()
    assert len(made) <= 5
    assert "data" not in {thread.name for thread in threading.enumerate()}


def test_an_error_comes_out_at_its_place():
    def values():
        yield 1
        raise KeyError("third")

    ahead = Ahead(values(), 4)
    assert next(ahead) == 1
    with pytest.raises(KeyError, match="third"):
        next(ahead)
    assert list(ahead) == []


def test_closing_drops_what_is_ready_and_twice_does_no_harm():
    ahead = Ahead(iter(range(100)), 5)
    assert next(ahead) == 0
    ahead.close()
    ahead.close()
    assert list(ahead) == []
