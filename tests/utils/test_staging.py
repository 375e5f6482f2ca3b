"""Output folders that appear whole, and which errors are explained as the output's."""

from __future__ import annotations

import errno
import os

import pytest

from megatron_nucleus.utils.errors import ConfigError, DataError
from megatron_nucleus.utils.files import open_atomic
from megatron_nucleus.utils.staging import check_writable, explain_writing, staged_folder


def test_a_staged_folder_appears_whole_or_not_at_all(tmp_path):
    with staged_folder(tmp_path / "new" / "out") as folder:
        (folder / "a").write_text("1")
        assert not (tmp_path / "new" / "out").exists()
    assert (tmp_path / "new" / "out" / "a").read_text() == "1"

    def fill_and_fail(error):
        with staged_folder(tmp_path / "never") as folder:
            (folder / "a").write_text("1")
            raise error

    with pytest.raises(KeyboardInterrupt):
        fill_and_fail(KeyboardInterrupt())
    with pytest.raises(DataError, match=r"never: cannot be written \(No space left on device\); free"):
        fill_and_fail(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
    assert [p.name for p in tmp_path.iterdir()] == ["new"]


def test_an_atomic_file_is_the_old_one_after_an_error(tmp_path):
    path = tmp_path / "f"
    with open_atomic(path) as file:
        file.write(b"old")

    def write_and_fail():
        with open_atomic(path) as file:
            file.write(b"new")
            assert path.read_bytes() == b"old"
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_and_fail()
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("f", b"old")]


def error(number, filename=None):
    return OSError(number, os.strerror(number), *([filename] if filename is not None else []))


@pytest.mark.parametrize(
    ("raised", "becomes"),
    [
        (error(errno.ENOSPC), DataError),
        (error(errno.EDQUOT), DataError),
        (error(errno.ENOSPC, "out/shards/x"), DataError),
        (error(errno.EACCES, b"out/shards/x"), ConfigError),
        (error(errno.EROFS, "."), ConfigError),  # the folder that out would lie in
        (error(errno.EACCES, "in/a.png"), OSError),  # not the output's
        (error(errno.ENOSPC, "/elsewhere/x"), OSError),
        (error(errno.EACCES, "output_of_another/x"), OSError),
        (error(errno.EMFILE), OSError),
    ],
)
def test_only_errors_of_the_output_are_explained(tmp_path, monkeypatch, raised, becomes):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(becomes) as caught, explain_writing("out", "all is well"):
        raise raised
    assert (caught.value is raised) == (becomes is OSError)
    if becomes is not OSError:
        assert str(caught.value).startswith("out: cannot be written (")
        assert str(caught.value).endswith("; all is well")


def test_a_folder_that_may_not_be_written(tmp_path, monkeypatch):
    check_writable(tmp_path / "a" / "b")
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(ConfigError, match=f"--run-dir {tmp_path}/a: {tmp_path} cannot be written; name"):
        check_writable(tmp_path / "a", "--run-dir")
