"""tools/encode.py: encoded folders give the loader's batches, are resumable, exact and honest about losses."""

from __future__ import annotations

import hashlib
import importlib.util
import io
import json
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from PIL import Image

from megatron_nucleus.data import encode as encode_module
from megatron_nucleus.data.dataset import open_corpus
from megatron_nucleus.data.encode import EncodeConfig, encode_corpus
from megatron_nucleus.data.encoders import DctCodec, NgramTextEncoder
from megatron_nucleus.data.features import FeatureExtractor
from megatron_nucleus.data.loader import DataConfig, build_loader
from megatron_nucleus.data.manifest import DatasetWriter
from megatron_nucleus.data.shards import encode_json
from megatron_nucleus.utils.errors import ConfigError, DataError

SIZES = {"1024x1024": (40, 40), "1344x768": (70, 40), "768x1344": (45, 80)}
TOOL = Path(__file__).parents[2] / "tools" / "encode.py"


def caption(text, length_class):
    return {
        "text": text,
        "length_class": length_class,
        "source": "test",
        "model": None,
        "model_revision": None,
        "prompt_hash": None,
        "alignment": None,
    }


def curated(folder, count=30, damaged=(), max_shard_bytes=20_000):
    """A small curated folder with three buckets, several shards and one to three captions per image."""
    writer = DatasetWriter(folder, tool="curate", settings={"made": "here"}, max_shard_bytes=max_shard_bytes)
    rng = np.random.default_rng(0)
    for i in range(count):
        bucket = list(SIZES)[i % 3]
        image = Image.fromarray(rng.integers(0, 256, (*SIZES[bucket][::-1], 3), dtype=np.uint8))
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        payload = buffer.getvalue()[:400] if i in damaged else buffer.getvalue()
        sample_id = hashlib.sha256(payload).hexdigest()
        captions = [caption(f"number {i}", "short"), caption(f"a longer text about number {i}", "detailed")]
        captions = captions[: 1 + i % 2] if i else []
        row = {
            "id": sample_id,
            "source_id": f"image{i}.png",
            "aspect_bucket": bucket,
            "width_px": SIZES[bucket][0],
            "height_px": SIZES[bucket][1],
            "captions": captions,
            "stage_versions": {"decode": "1"},
        }
        writer.add(row, {"png": payload, "json": encode_json({"captions": captions, "kept": i})})
    writer.finish({"seen": count, "kept": count})
    return folder


def run_encode(source, output, config=None, codec=None, **changes):
    arguments = {"resolution_px": 32, "patch_size": 2, **changes}
    return encode_corpus(
        source,
        output,
        codec or DctCodec(),
        NgramTextEncoder(max_tokens=6),
        config or EncodeConfig(encode_batch_size=4),
        **arguments,
    )


def tree(folder):
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(Path(folder).rglob("*"))
        if path.is_file()
    }


def test_the_loader_gives_the_same_batches(tmp_path):
    source = curated(tmp_path / "curated")
    result = run_encode(source, tmp_path / "encoded", EncodeConfig(4, "float32"))
    assert (result["seen"], result["kept"], result["quarantined"]) == (30, 30, {})
    assert result["captions"] == 15 + 2 * 15 - 1  # the first image has none
    assert result["captions_truncated"] == 0
    text_encoder = NgramTextEncoder(max_tokens=6)
    batches = []
    for path in (source, tmp_path / "encoded"):
        corpus = open_corpus(path)
        config = DataConfig(str(path), resolution_px=32, caption_drop_frac=0.3, num_workers=0)
        loader = build_loader(
            config, corpus, seed=3, global_batch_size=6, accumulation=2, multiple_px=8, start_samples=12
        )
        codec = None if corpus.encoded else DctCodec()
        features = FeatureExtractor(codec, None if corpus.encoded else text_encoder, patch_size=2)
        raw = [next(loader) for _ in range(12)]
        batches.append([(r, features.extract(r)) for r in raw])
        assert (raw[0].pixels_BCHW is None) == bool(corpus.encoded)
    assert len({r.bucket for r, _ in batches[0]}) == 3
    assert any("" in r.texts for r, _ in batches[0])
    for (raw_online, online), (raw_stored, stored) in zip(*batches, strict=True):
        assert raw_online.ids == raw_stored.ids
        assert raw_online.texts == raw_stored.texts
        assert (online.bucket, online.draws, online.grid) == (stored.bucket, stored.draws, stored.grid)
        torch.testing.assert_close(online.latents_BSP, stored.latents_BSP, rtol=1e-6, atol=1e-6)
        assert torch.equal(online.text.features_BLU, stored.text.features_BLU)
        if online.text.mask_BL is None:
            assert stored.text.mask_BL is None
        else:
            assert torch.equal(online.text.mask_BL, stored.text.mask_BL)


def test_index_manifest_and_side_data_are_kept(tmp_path):
    source = curated(tmp_path / "curated")
    run_encode(source, tmp_path / "encoded")
    before = {r["id"]: r for r in pq.read_table(source / "index").to_pylist()}
    after = {r["id"]: r for r in pq.read_table(tmp_path / "encoded" / "index").to_pylist()}
    assert before.keys() == after.keys()
    places = ("tar", "offset", "length")
    for key, row in before.items():
        assert {k: v for k, v in row.items() if k not in places} == {
            k: v for k, v in after[key].items() if k not in places
        }
    manifest = json.loads((tmp_path / "encoded" / "manifest.json").read_text())
    assert manifest["encoded"]["codec"] == DctCodec().spec()
    assert manifest["encoded"]["text_encoder"] == NgramTextEncoder(max_tokens=6).spec()
    assert manifest["encoded"]["resolution_px"] == 32
    corpus = open_corpus(tmp_path / "encoded")
    assert sorted(corpus.read(row).info["kept"] for row in range(len(corpus))) == list(range(30))
    empty = corpus.empty_text()
    assert empty.dtype == torch.bfloat16
    assert torch.equal(empty.float(), NgramTextEncoder().encode([""]).features_BLU[0])  # signs are exact
    assert not (tmp_path / "encoded" / ".progress").exists()


def test_a_stopped_run_goes_on_and_gives_the_same_bytes(tmp_path, monkeypatch):
    source = curated(tmp_path / "curated", count=60)
    whole = run_encode(source, tmp_path / "whole")
    assert whole["shards"] > 4
    make = encode_module._FeatureMaker.samples
    calls = []

    def stop_in_the_fifth_batch(self, samples):
        calls.append(len(samples))
        if len(calls) == 8:
            raise KeyboardInterrupt
        return make(self, samples)

    monkeypatch.setattr(encode_module._FeatureMaker, "samples", stop_in_the_fifth_batch)
    with pytest.raises(KeyboardInterrupt):
        run_encode(source, tmp_path / "parts")
    assert not list((tmp_path / "parts" / "shards").glob(".*"))  # nothing half-written
    with pytest.raises(DataError, match="unfinished"):
        open_corpus(tmp_path / "parts")
    before = sum(calls[:-1])
    calls.clear()
    monkeypatch.setattr(
        encode_module._FeatureMaker, "samples", lambda self, s: calls.append(len(s)) or make(self, s)
    )
    seen = []
    assert (
        run_encode(source, tmp_path / "parts", progress=lambda done, total: seen.append((done, total)))
        == whole
    )
    assert 0 < 60 - sum(calls) <= before  # finished shards were not made again
    assert seen == sorted(seen)
    assert seen[-1] == (60, 60)
    assert tree(tmp_path / "parts") == tree(tmp_path / "whole")
    calls.clear()
    assert run_encode(source, tmp_path / "parts") == whole  # complete: nothing to do
    assert not calls


OTHER_SETTINGS = {
    "resolution_px": {"resolution_px": 64},
    "codec": {"codec": DctCodec(coefficients=(16, 16, 16))},
    "config": {"config": EncodeConfig(4, "float32")},
    "shard size": {"config": EncodeConfig(4, max_shard_bytes=30_000)},
}


@pytest.mark.parametrize("change", OTHER_SETTINGS.values(), ids=OTHER_SETTINGS)
@pytest.mark.parametrize("back", [False, True])
def test_a_stopped_run_goes_on_with_other_settings_as_a_new_one(tmp_path, monkeypatch, change, back):
    """Also when the second run, too, was stopped and the first settings come back."""
    source = curated(tmp_path / "curated", count=24)
    write = encode_module._write_record

    def stop_after_one_shard(*args):
        write(*args)
        raise KeyboardInterrupt

    attempts = [{}, change] if back else [{}]
    with monkeypatch.context() as patch:
        patch.setattr(encode_module, "_write_record", stop_after_one_shard)
        for settings in attempts:
            with pytest.raises(KeyboardInterrupt):
                run_encode(source, tmp_path / "parts", **settings)
            assert len(list((tmp_path / "parts" / ".progress").glob("*.json"))) == 1
    last = {} if back else change
    result = run_encode(source, tmp_path / "parts", **last)
    assert result == run_encode(source, tmp_path / "whole", **last)
    assert tree(tmp_path / "parts") == tree(tmp_path / "whole")


def test_another_source_is_encoded_from_its_start(tmp_path, monkeypatch):
    first = curated(tmp_path / "first", count=12)
    second = curated(tmp_path / "second", count=12, damaged=(2,))

    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(encode_module, "write_manifest", stop)
        with pytest.raises(KeyboardInterrupt):
            run_encode(first, tmp_path / "parts")
    assert run_encode(second, tmp_path / "parts") == run_encode(second, tmp_path / "whole")
    assert tree(tmp_path / "parts") == tree(tmp_path / "whole")


def test_a_killed_and_a_signalled_program(tmp_path):
    source = curated(tmp_path / "curated", count=15)
    whole = run_encode(source, tmp_path / "whole", EncodeConfig())
    (tmp_path / "slow.py").write_text(
        "import sys, time\n"
        "from megatron_nucleus.data import encode\n"
        "make = encode._FeatureMaker.samples\n"
        "def slow(self, samples):\n"
        "    print('ready', flush=True)\n"
        "    time.sleep(0.3)\n"
        "    return make(self, samples)\n"
        "encode._FeatureMaker.samples = slow\n"
        f"sys.argv[0] = {str(TOOL)!r}\n"
        "import runpy\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    command = [sys.executable, str(tmp_path / "slow.py"), "--data-path", str(source), "--device", "cpu"]
    command += ["--output", str(tmp_path / "out"), "--resolution-px", "32", "--max-text-tokens", "6"]
    for number, code in ((signal.SIGTERM, 4), (signal.SIGKILL, -signal.SIGKILL)):
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2):
            assert process.stdout.readline() == "ready\n"
        process.send_signal(number)
        _, errors = process.communicate(timeout=60)
        assert process.returncode == code
        if number == signal.SIGTERM:
            assert errors.strip().splitlines()[-1].startswith("error: stopped by SIGTERM; the same command")
    assert run_encode(source, tmp_path / "out", EncodeConfig()) == whole
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")


def test_a_lost_shard_is_made_again_on_resume(tmp_path, monkeypatch):
    source = curated(tmp_path / "curated", count=15)
    run_encode(source, tmp_path / "whole")

    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(encode_module, "write_manifest", stop)
    with pytest.raises(KeyboardInterrupt):
        run_encode(source, tmp_path / "parts")
    monkeypatch.undo()
    sorted((tmp_path / "parts" / "shards").iterdir())[1].unlink()
    run_encode(source, tmp_path / "parts")
    assert tree(tmp_path / "parts") == tree(tmp_path / "whole")


def test_undecodable_images_are_quarantined_and_counts_reconcile(tmp_path):
    source = curated(tmp_path / "curated", damaged=(4, 9, 10))
    result = run_encode(source, tmp_path / "encoded")
    assert result["seen"] == 30
    assert result["kept"] == 27
    assert sum(result["quarantined"].values()) == 3
    lost = pq.read_table(tmp_path / "encoded" / "quarantine").to_pylist()
    assert sorted(row["item"] for row in lost) == ["image10.png", "image4.png", "image9.png"]
    assert {row["stage"] for row in lost} == {"encode"}
    source = curated(tmp_path / "all_bad", count=3, damaged=(0, 1, 2))
    with pytest.raises(DataError, match="no image could be decoded"):
        run_encode(source, tmp_path / "none")


def test_long_captions_are_cut_and_counted(tmp_path):
    source = curated(tmp_path / "curated", count=8)
    result = encode_corpus(
        source,
        tmp_path / "encoded",
        DctCodec(),
        NgramTextEncoder(max_tokens=4),
        EncodeConfig(encode_batch_size=3),
        resolution_px=32,
        patch_size=2,
    )
    assert result["captions_truncated"] == 4


def test_shards_stay_below_the_limit_and_workers_change_nothing(tmp_path):
    source = curated(tmp_path / "curated", count=24, max_shard_bytes=1 << 20)
    assert len(list((source / "shards").iterdir())) == 3
    config = EncodeConfig(encode_batch_size=4, max_shard_bytes=30_000)
    run_encode(source, tmp_path / "encoded", config)
    shards = list((tmp_path / "encoded" / "shards").iterdir())
    assert len(shards) > 6
    assert max(path.stat().st_size for path in shards) <= 30_000
    run_encode(source, tmp_path / "workers", config, num_workers=2)
    assert tree(tmp_path / "workers") == tree(tmp_path / "encoded")


def test_what_cannot_be_encoded(tmp_path):
    source = curated(tmp_path / "curated", count=6)
    run_encode(source, tmp_path / "encoded")
    with pytest.raises(ConfigError, match="is encoded already"):
        run_encode(tmp_path / "encoded", tmp_path / "again")
    with pytest.raises(ConfigError, match="made differently .*resolution_px"):
        run_encode(source, tmp_path / "encoded", resolution_px=64)
    with pytest.raises(ConfigError, match="resolution_px 36 is not a positive multiple of 8"):
        run_encode(source, tmp_path / "new", resolution_px=36)
    assert not (tmp_path / "new").exists()
    with pytest.raises(ConfigError, match="no such folder"):
        run_encode(tmp_path / "nowhere", tmp_path / "new")
    with pytest.raises(ConfigError, match="encode_batch_size: must be at least 1"):
        EncodeConfig(encode_batch_size=0)
    shard = sorted((source / "shards").iterdir())[0]
    data = bytearray(shard.read_bytes())
    data[:5] = b"wrong"
    shard.write_bytes(data)
    with pytest.raises(DataError, match=rf"{shard.name}: sample"):
        run_encode(source, tmp_path / "new")


def tool():
    spec = importlib.util.spec_from_file_location("encode_tool", TOOL)
    module = sys.modules["encode_tool"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_program(tmp_path, capsys):
    source = curated(tmp_path / "curated", count=6, damaged=(4,))
    file = tmp_path / "run.yaml"
    file.write_text(
        yaml.safe_dump(
            {
                "data": {"data_path": "overridden", "resolution_px": 64, "num_workers": 0},
                "encoders": {"dct_coefficients": [16, 16, 16]},
                "model": {"latent_channels": 48, "patch_size": 4},
                "training": {"train_steps": 3},
            }
        )
    )
    arguments = ["--config", str(file), "--data-path", str(source), "--output", str(tmp_path / "encoded")]
    tool().main(
        [*arguments, "--resolution-px", "32", "--stored-text-dtype", "float32", "--device", "cpu", "--json"]
    )
    lines = capsys.readouterr().out.strip().splitlines()
    result = json.loads(lines[-1])
    assert (result["seen"], result["kept"], sum(result["quarantined"].values())) == (6, 5, 1)
    assert lines[-2].startswith("left out: 1 x ")
    corpus = open_corpus(tmp_path / "encoded")
    assert corpus.encoded["codec"]["coefficients"] == [16, 16, 16]
    assert (corpus.encoded["resolution_px"], corpus.encoded["patch_size"]) == (32, 4)
    with pytest.raises(ConfigError, match=r"unknown argument --resolution .*--resolution-px"):
        tool().main([*arguments, "--resolution", "32"])
    with pytest.raises(ConfigError, match=r"--output .*made differently"):
        tool().main([*arguments, "--device", "cpu"])
    with pytest.raises(ConfigError, match="codec_path .*is required"):
        tool().main([*arguments, "--latent-codec", "qwen_image_vae", "--device", "cpu"])
