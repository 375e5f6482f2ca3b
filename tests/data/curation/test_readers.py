"""Reading the input: folders and tars in any shape, references that are exact, nothing that escapes or hangs."""

from __future__ import annotations

import gzip
import io
import os
import tarfile

import pytest

from megatron_nucleus.data.curation import readers
from megatron_nucleus.data.images import UnusableImage
from megatron_nucleus.utils.errors import ConfigError


def put(folder, files):
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def make_tar(path, members, format=tarfile.USTAR_FORMAT):
    """members: (name or TarInfo, content)."""
    with tarfile.open(path, "w", format=format) as tar:
        for member, content in members:
            info = member if isinstance(member, tarfile.TarInfo) else tarfile.TarInfo(member)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def items_of(root):
    return [item for task in readers.scan(root).tasks for item in readers.task_items(task)]


def read_all(root):
    """name -> (bytes or problem reason, sidecar contents)."""
    out = {}
    for item in items_of(root):
        if item.problem:
            out[item.name] = item.problem[0]
            continue
        payload = readers.read_reference(str(root), item.reference, 1 << 20)
        sidecars = [readers.read_reference(str(root), ref, 1 << 20) for _, ref in item.sidecars]
        out[item.name] = (payload, *sidecars)
    return out


def test_folder_pairs_images_with_captions_recursively(tmp_path):
    put(
        tmp_path,
        {
            "b.jpg": b"B",
            "b.txt": b"tb",
            "b.json": b"jb",
            "sub/deep/a.PNG": b"A",
            "sub/deep/a.TXT": b"ta",
            "my.photo.v2.jpg": b"M",
            "my.photo.v2.txt": b"tm",
            "both.jpg": b"1",
            "both.png": b"2",
            "both.txt": b"shared",
            "alone.webp": b"L",
            "orphan.txt": b"o",
            ".hidden.jpg": b"H",
            "__MACOSX/b.jpg": b"X",
            "noextension": b"N",
        },
    )
    scan = readers.scan(tmp_path)
    assert read_all(tmp_path) == {
        "b.jpg": (b"B", b"jb", b"tb"),
        "sub/deep/a.PNG": (b"A", b"ta"),
        "my.photo.v2.jpg": (b"M", b"tm"),
        "both.jpg": (b"1", b"shared"),
        "both.png": (b"2", b"shared"),
        "alone.webp": (b"L",),
        "noextension": (b"N",),
    }
    assert (scan.files, scan.tars, scan.ignored, scan.captions_without_image) == (7, 0, 2, 1)


def test_names_that_are_no_utf8_and_have_spaces(tmp_path):
    put(tmp_path, {"ä b.jpg": b"1", "ä b.txt": b"t"})
    raw = os.path.join(os.fsencode(tmp_path), b"caf\xe9.jpg")
    with open(raw, "wb") as file:
        file.write(b"2")
    assert read_all(tmp_path) == {"ä b.jpg": (b"1", b"t"), "caf\\xe9.jpg": (b"2",)}


def test_links_pipes_and_loops_do_not_hang(tmp_path):
    outside = tmp_path / "outside"
    put(outside, {"x.jpg": b"X", "x.txt": b"t"})
    root = tmp_path / "in"
    put(root, {"a.jpg": b"A"})
    (root / "linked").symlink_to(outside)
    (root / "loop").symlink_to(root)
    (root / "file.jpg").symlink_to(outside / "x.jpg")
    (root / "broken.jpg").symlink_to(root / "nothing")
    os.mkfifo(root / "pipe.jpg")
    names = {}
    for item in items_of(root):
        try:
            names[item.name] = readers.read_reference(str(root), item.reference, 100)
        except UnusableImage as problem:
            names[item.name] = problem.reason
    assert names == {
        "a.jpg": b"A",
        "linked/x.jpg": b"X",
        "file.jpg": b"X",
        "broken.jpg": "unreadable",
        "pipe.jpg": "not_a_file",
    }


def test_tasks_and_fingerprint_depend_on_the_content_alone(tmp_path):
    many = {f"{i:04d}.jpg": bytes([i % 256]) for i in range(readers.FILES_PER_TASK + 10)}
    put(tmp_path / "a", dict(sorted(many.items())))
    put(tmp_path / "b", dict(sorted(many.items(), reverse=True)))
    first, second = readers.scan(tmp_path / "a"), readers.scan(tmp_path / "b")
    assert [t.items for t in first.tasks] == [t.items for t in second.tasks]
    assert [len(t.items) for t in first.tasks] == [readers.FILES_PER_TASK, 10]
    assert first.fingerprint == second.fingerprint
    put(tmp_path / "b", {"0000.jpg": b"longer"})
    assert readers.scan(tmp_path / "b").fingerprint != first.fingerprint


def test_an_edit_that_keeps_the_size_changes_the_stamp_alone(tmp_path):
    put(tmp_path, {"a.jpg": b"old", "a.txt": b"text"})
    before = readers.scan(tmp_path)
    assert [t.stamp for t in readers.scan(tmp_path).tasks] == [t.stamp for t in before.tasks]
    put(tmp_path, {"a.jpg": b"new"})
    os.utime(tmp_path / "a.jpg", ns=(1, 1))
    after = readers.scan(tmp_path)
    assert after.fingerprint == before.fingerprint
    assert [t.stamp for t in after.tasks] != [t.stamp for t in before.tasks]


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_tars_as_img2dataset_writes_them_and_in_any_order(tmp_path, format):
    long = "d" * 90 + "/" + "n" * 60
    make_tar(
        tmp_path / "00000.tar",
        [
            ("000000001.txt", b"t1"),
            ("000000000.jpg", b"J0"),
            ("000000000.txt", b"t0"),
            ("000000000.json", b"j0"),
            ("000000001.jpg", b"J1" * 400),
            ("sub/x.webp", b"W"),
            ("./sub/x.json", b"jx"),
            ("sub/x.cls", b"7"),
            ("my.photo.jpg", b"M"),
            ("my.photo.txt", b"tm"),
            ("._000000000.jpg", b"apple"),
            (f"{long}.png" if format != tarfile.USTAR_FORMAT else "long.png", b"L"),
            ("other.bin", b"O"),
        ],
        format,
    )
    put(tmp_path, {"00000.parquet": b"PAR1", "00000_stats.json": b"{}"})
    got = read_all(tmp_path)
    last = f"{long}.png" if format != tarfile.USTAR_FORMAT else "long.png"
    assert got == {
        "00000.tar/000000000.jpg": (b"J0", b"j0", b"t0"),
        "00000.tar/000000001.jpg": (b"J1" * 400, b"t1"),
        "00000.tar/sub/x.webp": (b"W", b"jx"),
        "00000.tar/my.photo.jpg": (b"M", b"tm"),
        f"00000.tar/{last}": (b"L",),
        "00000.tar/other.bin": (b"O",),
    }
    assert readers.scan(tmp_path).ignored == 2


def link(name, target, kind):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def test_members_that_would_escape_are_refused(tmp_path):
    make_tar(
        tmp_path / "evil.tar",
        [
            ("../evil.jpg", b"E"),
            ("/etc/evil.jpg", b"E"),
            ("a/../../evil.txt", b"E"),
            ("..\\evil.jpg", b"E"),
            ("C:\\evil.jpg", b"E"),
            (link("link.jpg", "/etc/passwd", tarfile.SYMTYPE), b""),
            (link("hard.jpg", "good.jpg", tarfile.LNKTYPE), b""),
            (link("pipe.jpg", "", tarfile.FIFOTYPE), b""),
            ("good..name.jpg", b"G"),
            ("good.jpg", b"G"),
            ("good.txt", b"t"),
        ],
    )
    assert read_all(tmp_path) == {
        "evil.tar/../evil.jpg": "unsafe_member",
        "evil.tar//etc/evil.jpg": "unsafe_member",
        "evil.tar/a/../../evil.txt": "unsafe_member",
        "evil.tar/..\\evil.jpg": "unsafe_member",
        "evil.tar/C:\\evil.jpg": "unsafe_member",
        "evil.tar/link.jpg": "not_a_file",
        "evil.tar/hard.jpg": "not_a_file",
        "evil.tar/pipe.jpg": "not_a_file",
        "evil.tar/good..name.jpg": (b"G", b"t"),  # WebDataset: the key ends at the first dot
        "evil.tar/good.jpg": (b"G", b"t"),
    }
    assert sorted(p.name for p in tmp_path.iterdir()) == ["evil.tar"]


def test_of_members_of_one_name_the_first_counts_and_none_is_lost(tmp_path):
    make_tar(
        tmp_path / "x.tar",
        [
            ("a.jpg", b"1"),
            ("a.txt", b"t1"),
            ("a.jpg", b"2"),
            ("a.txt", b"t2"),
            ("./a.jpg", b"3"),
            ("../e", b""),
            ("../e", b""),
        ],
    )
    assert read_all(tmp_path) == {
        "x.tar/a.jpg": (b"1", b"t1"),
        "x.tar/a.jpg (at byte 2560)": "duplicate_member",
        "x.tar/a.txt (at byte 3584)": "duplicate_member",
        "x.tar/a.jpg (at byte 4608)": "duplicate_member",
        "x.tar/../e": "unsafe_member",
        "x.tar/../e (at byte 6144)": "unsafe_member",
    }
    spans = [i.reference for i in items_of(tmp_path) if i.problem and i.problem[0] == "duplicate_member"]
    assert [readers.read_reference(str(tmp_path), ref, 9) for ref in spans] == [b"2", b"t2", b"3"]


def test_caption_files_of_one_kind_in_two_spellings_both_count(tmp_path):
    make_tar(tmp_path / "x.tar", [("a.jpg", b"A"), ("a.txt", b"t"), ("a.TXT", b"u")])
    put(tmp_path, {"b.jpg": b"B", "b.txt": b"v", "b.TXT": b"w"})
    assert read_all(tmp_path) == {"x.tar/a.jpg": (b"A", b"t", b"u"), "b.jpg": (b"B", b"w", b"v")}


def test_parts_as_tables(tmp_path):
    """`list_part` says what `task_items` says, and every reason is declared."""
    put(tmp_path, {"a.jpg": b"A", "a.txt": b"t"})
    make_tar(tmp_path / "x.tar", [("../evil.jpg", b"E"), ("b.jpg", b"B"), ("b.json", b"{}")])
    with open(tmp_path / "x.tar", "ab") as file:
        file.write(b"junk")
    for task in readers.scan(tmp_path).tasks:
        table, items = readers.list_part(task), readers.task_items(task)
        assert table.schema == readers.LISTED_SCHEMA
        for row, item in zip(table.to_pylist(), items, strict=True):
            assert readers.Reference(row["container"], row["offset"], row["length"]) == item.reference
            named = [
                (s["name"], readers.Reference(s["container"], s["offset"], s["length"]))
                for s in row["sidecars"]
            ]
            assert (row["item"], tuple(named)) == (item.name, item.sidecars)
            problem = row["problem"] and (row["problem"]["reason"], row["problem"]["detail"])
            assert (problem, row["given"]) == (item.problem, item.given)
            assert problem is None or problem[0] in readers.READ_REASONS
    assert [readers.describe(t) for t in readers.scan(tmp_path).tasks] == ["a.jpg", "x.tar"]


def test_a_damaged_tar_gives_what_lies_before_the_damage(tmp_path):
    members = [(f"{i}.jpg", bytes([i]) * 1000) for i in range(6)]
    make_tar(tmp_path / "whole.tar", members)
    whole = (tmp_path / "whole.tar").read_bytes()
    (tmp_path / "whole.tar").unlink()
    step = 512 + 1024
    flipped = bytearray(whole)
    flipped[3 * step + 10] ^= 0xFF
    cases = {
        "cut_in_payload": (whole[: 2 * step + 700], 2, "cut off"),
        "cut_in_header": (whole[: 2 * step + 100], 2, "truncated header"),
        "cut_between": (whole[: 4 * step], 4, "without an end marker"),
        "flipped_header": (bytes(flipped), 3, "bad checksum"),
        "joined": (whole + whole, 6, "behind the end marker"),
        "empty": (b"", 0, "empty file"),
        "garbage": (b"no tar at all" * 100, 0, "at byte 0"),
        "gzip": (gzip.compress(whole), 0, "gzip"),
    }
    for name, (content, kept, message) in cases.items():
        root = tmp_path / name
        put(root, {"x.tar": content})
        items = items_of(root)
        good, bad = items[:-1], items[-1]
        assert bad.name == "x.tar (rest)", name
        assert bad.problem[0] == "damaged_tar"
        assert message in bad.problem[1], name
        assert [readers.read_reference(str(root), i.reference, 5000) for i in good] == [
            m[1] for m in members[:kept]
        ], name
    put(tmp_path / "fine", {"x.tar": whole})
    assert len(items_of(tmp_path / "fine")) == 6


def test_references_are_checked(tmp_path):
    put(tmp_path, {"a.jpg": b"12345", "b.tar.gz": b"x", "c.tgz": b"x"})
    root = str(tmp_path)
    assert readers.read_reference(root, readers.Reference(b"a.jpg", 1, 3), 3) == b"234"
    for reference, limit, reason in [
        (readers.Reference(b"a.jpg"), 4, "file_too_large"),
        (readers.Reference(b"a.jpg", 3, 3), 9, "unreadable"),
        (readers.Reference(b"gone.jpg"), 9, "unreadable"),
        (readers.Reference(b""), 9, "not_a_file"),
        (readers.Reference(b"b.tar.gz"), 9, "compressed_tar"),
        (readers.Reference(b"c.tgz"), 9, "compressed_tar"),
    ]:
        with pytest.raises(UnusableImage) as caught:
            readers.read_reference(root, reference, limit)
        assert caught.value.reason == reason


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(ConfigError, match=r"--input .*nowhere: no such folder"):
        readers.scan(tmp_path / "nowhere")
    put(tmp_path, {"f": b""})
    with pytest.raises(ConfigError, match="is not a folder"):
        readers.scan(tmp_path / "f")


def test_a_link_in_a_circle_is_an_item_that_cannot_be_read(tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "nowhere.jpg").symlink_to("missing")
    found = readers.scan(tmp_path)
    assert [item.name for task in found.tasks for item in task.items] == ["loop", "nowhere.jpg"]
    with pytest.raises(UnusableImage, match="unreadable"):
        readers.read_reference(str(tmp_path), readers.Reference(b"loop"), 100)
