"""Which file of the input a cell of a table means."""

from __future__ import annotations

import os


class NamedFiles:
    """Which files of the folder tables name; ``known``: all files of the folder."""

    def __init__(self, root: str, known: set[bytes]):
        self._places = Places(root)
        self._known = known
        self.named: set[bytes] = set()

    def add(self, table: bytes, path: object) -> None:
        """Note the file that a cell of ``table`` names, if the folder has it."""
        if not isinstance(path, str) or not path.strip():
            return
        try:
            candidates = self._places.candidates(table, path)
        except ValueError:
            return
        if found := next((c for c in candidates if c in self._known), None):
            self.named.add(found)


class Places:
    """From what a cell says to a path inside the input."""

    def __init__(self, root: str):
        plain = os.fsencode(root)
        self._roots = (os.path.abspath(plain), os.path.realpath(plain))

    def candidates(self, table: bytes, path: str) -> list[bytes]:
        """Paths relative to the input that ``path`` may mean, the likelier first; none: it leaves the input.

        Raises:
            ValueError: no name that a file can have.
        """
        if "\0" in path:
            raise ValueError("a zero byte in it")
        raw, folder = os.fsencode(path), os.path.dirname(table)
        if _is_plain(raw):
            return [os.path.join(folder, raw), raw] if folder else [raw]
        if os.path.isabs(raw):
            found = [os.path.relpath(os.path.normpath(raw), root) for root in self._roots]
        else:
            found = [os.path.normpath(os.path.join(folder, raw)), os.path.normpath(raw)]
        inside = [p for p in found if p not in (b".", b"..") and not p.startswith(b"../")]
        return list(dict.fromkeys(inside))


def _is_plain(path: bytes) -> bool:
    """Whether a path is relative, goes downward only and is in its shortest form; nearly all are."""
    return not path.startswith((b"/", b".")) and b"/." not in path and b"//" not in path and path[-1:] != b"/"
