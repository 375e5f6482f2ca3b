"""An iterator that a thread runs ahead, where processes are not possible."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from typing import Generic, TypeVar

T = TypeVar("T")
_LOOK_S = 0.1  # how often a thread that waits for room looks whether it should end


class Ahead(Generic[T]):
    """The values of ``values``, up to ``depth`` of them made before they are asked for, in their order.

    An exception comes out at its place and ends the iterator. ``close`` ends the thread after the value in hand.
    """

    def __init__(self, values: Iterator[T], depth: int):
        self._made: queue.Queue[tuple[str, object]] = queue.Queue(depth)
        self._closed = threading.Event()
        self._over = False
        # Not what holds up an exit: the interpreter may end while a value is being made.
        self._thread = threading.Thread(target=self._run, args=(values,), name="data", daemon=True)
        self._thread.start()

    def __iter__(self) -> Ahead[T]:
        return self

    def __next__(self) -> T:
        if self._over:
            raise StopIteration
        kind, value = self._made.get()
        if kind == "value":
            return value  # type: ignore[return-value]
        self._over = True
        raise value  # type: ignore[misc]

    def close(self) -> None:
        """End the thread. Whatever it made and nobody took is dropped."""
        self._over = True
        self._closed.set()
        if threading.current_thread() is not self._thread:  # the garbage collector runs where it likes
            self._thread.join()

    def _run(self, values: Iterator[T]) -> None:
        try:
            for value in values:
                if not self._put(("value", value)):
                    return
            self._put(("end", StopIteration()))
        except BaseException as error:  # told to whoever asks for the next value
            self._put(("error", error))

    def _put(self, item: tuple[str, object]) -> bool:
        """Wait for room; False once closed."""
        while not self._closed.is_set():
            try:
                self._made.put(item, timeout=_LOOK_S)
            except queue.Full:
                continue
            return True
        return False
