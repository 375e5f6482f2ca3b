"""Training on stored features: the same run, without the encoders that made them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from megatron_nucleus.data.encoders import same_encoder
from megatron_nucleus.export import native
from megatron_nucleus.training import training
from megatron_nucleus.utils.errors import ConfigError, DataError
from tests.support import tool
from tests.training.runs import damaged_copy, held_out_ids, rows, run_here


@pytest.fixture(scope="session")
def encoded(tmp_path_factory, corpus) -> Path:
    """The corpus, encoded with the run's encoders."""
    folder = tmp_path_factory.mktemp("encoded") / "data"
    tool("encode", "--data-path", corpus, "--output", folder, "--resolution-px", 32, "--device", "cpu",
         "--stored-text-dtype", "float32")  # fmt: skip
    return folder


def test_stored_features_train_the_same_without_encoders(config_file, tmp_path, encoded, monkeypatch):
    """Bit for bit, but for the rounding of text padding; the encoders are built for previews alone."""
    from megatron_nucleus.training import initialize

    run_here(config_file, tmp_path / "images", "--train-steps", 3)
    with monkeypatch.context() as patch:
        for name in ("build_codec", "build_text_encoder"):
            patch.setattr(initialize, name, lambda *_: pytest.fail("an encoder was built"))
        run_here(config_file, tmp_path / "stored", "--train-steps", 3, "--data-path", encoded)
        with pytest.raises(ConfigError, match="--latent-channels 8: the codec 'dct' gives 16"):
            run_here(config_file, tmp_path / "a", "--data-path", encoded, "--latent-channels", 8)
        with pytest.raises(ConfigError, match="--text-dim 100.*gives 256"):
            run_here(config_file, tmp_path / "b", "--data-path", encoded, "--text-dim", 100)
        with pytest.raises(ConfigError, match="--height 33"):
            run_here(config_file, tmp_path / "c", "--data-path", encoded, "--height", 33)
    for a, b in zip(rows(tmp_path / "images"), rows(tmp_path / "stored"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
    specs = [
        {
            k: native.read_state(tmp_path / name / "checkpoints/step_00000003")[k]
            for k in ("codec", "text_encoder")
        }
        for name in ("images", "stored")
    ]
    assert specs[0] == specs[1]
    run_here(config_file, tmp_path / "stored", "--train-steps", 4, "--data-path", encoded,
             "--sample-interval", 1, "--sample-prompts", "a red circle")  # fmt: skip
    assert (tmp_path / "stored" / "samples" / "step_00000004.png").is_file()


def test_damaged_features_that_are_held_out_are_refused_before_the_first_step(config_file, tmp_path, encoded):
    ids = held_out_ids(encoded, 4)
    data = damaged_copy(encoded, tmp_path / "data", ids[3:])
    flags = ["--data-path", data, "--valid-samples", 4, "--train-steps", 1]
    with pytest.raises(DataError, match=rf"1 of 4 .*: sample {ids[3]}: damaged encoded sample .*{ids[3]}$"):
        run_here(config_file, tmp_path / "run", *flags)
    run_here(config_file, tmp_path / "run", *flags, "--valid-exclude-ids", ids[3])
    assert rows(tmp_path / "run")[-1]["valid_samples"] == 3


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--dct-coefficients", 16, 16, 16], "features of codec"),
        (["--max-text-tokens", 64], "features of text_encoder"),
        (["--patch-size", 1], "--patch-size 1: the stored features were made for 2"),
        (["--resolution-px", 64], "--resolution-px 64: the stored features were made for 32"),
        (
            ["--valid-samples", 8, "--valid-resolutions-px", 64],
            "--valid-resolutions-px 64: stored features have one",
        ),
        (["--num-experts", 32], "--num-experts 32: .* has 16 image tokens"),
    ],
)
def test_stored_features_of_another_kind_are_refused(
    config_file, tmp_path, encoded, flags, message, monkeypatch
):
    monkeypatch.setattr(training, "build_model", lambda *_: pytest.fail("the model was built"))
    with pytest.raises(ConfigError, match=message):
        run_here(config_file, tmp_path / "run", "--data-path", encoded, *flags)
    assert list((tmp_path / "run").iterdir()) == []


def test_a_moved_encoder_folder_is_no_other_run(config_file, tmp_path, encoded, monkeypatch):
    """Features of the VAE and of Qwen3-VL train where neither can be read; only their location is open."""
    vae = {"name": "qwen_image_vae", "path": "/old/vae", "tiling": False, "dtype": "float32"}
    qwen = {"name": "qwen3_vl", "dim": 256, "path": "/old/qwen", "max_tokens": 1024, "dtype": "float32",
            "hidden_state": -8}  # fmt: skip
    shutil.copytree(encoded, tmp_path / "data")
    manifest = json.loads((tmp_path / "data" / "manifest.json").read_text())
    manifest["encoded"] |= {"codec": vae, "text_encoder": qwen}
    (tmp_path / "data" / "manifest.json").write_text(json.dumps(manifest))
    flags = [
        "--data-path",
        tmp_path / "data",
        "--latent-codec",
        "qwen_image_vae",
        "--text-encoder",
        "qwen3_vl",
    ]
    run_here(config_file, tmp_path / "run", *flags, "--train-steps", 3)
    moved = ["--codec-path", "/new/vae", "--train-steps", 4]
    run_here(config_file, tmp_path / "run", *flags, *moved)
    for step, path in ((3, "/old/vae"), (4, "/new/vae")):
        state = native.read_state(tmp_path / "run" / "checkpoints" / native.step_name(step))
        assert state["codec"] == {**vae, "path": path}
        assert state["text_encoder"] == qwen
    with pytest.raises(ConfigError, match="features of text_encoder"):
        run_here(config_file, tmp_path / "other", *flags, "--max-text-tokens", 512)
    assert same_encoder(vae, {**vae, "path": "x", "dtype": "bfloat16", "tiling": True})
    assert not same_encoder(vae, qwen)
    assert not same_encoder(vae, None)
    assert same_encoder(None, None)
