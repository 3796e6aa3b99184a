"""HF -> converted -> HF gives the same bytes back, for every kind of checkpoint."""

import errno
import fcntl
import json
import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from beacon_jax.hf import load, tree_hash
from beacon_jax.hf.conversion import from_hf, to_hf

GOLDENS = Path(__file__).parents[1] / "goldens"


def files_of(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def tensors_in(folder: Path) -> dict[str, np.ndarray]:
    return {
        key: value
        for path in folder.glob("*.safetensors")
        for key, value in load_file(path).items()
    }


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("beacons", [False, True])
@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {}),
        ("llama", {"attention_bias": True, "mlp_bias": True}),
        ("mistral", {}),
        ("qwen2", {"tie_word_embeddings": True}),
        ("qwen3", {}),
    ],
)
def test_the_round_trip_gives_every_file_back_byte_for_byte(
    tmp_path,
    make_checkpoint,
    config_of,
    beacon_fields,
    family,
    changes,
    beacons,
    shards,
    dtype,
):
    hf = config_of(family, **changes, **(beacon_fields if beacons else {}))
    src = make_checkpoint(hf, shards=shards, dtype=dtype)
    from_hf(src, tmp_path / "ours")
    to_hf(tmp_path / "ours", tmp_path / "back")
    assert files_of(tmp_path / "back") == files_of(src)
    assert (tmp_path / "ours" / "beacon.safetensors").exists() == beacons


@pytest.mark.parametrize("case", sorted(p.name for p in GOLDENS.glob("*")))
def test_golden_checkpoints_survive_the_round_trip(tmp_path, case):
    from_hf(GOLDENS / case, tmp_path / "ours")
    to_hf(tmp_path / "ours", tmp_path / "back")
    for name in ("config.json", "model.safetensors"):
        expected = (GOLDENS / case / name).read_bytes()
        assert (tmp_path / "back" / name).read_bytes() == expected


def test_kernels_are_transposed_split_into_heads_and_stacked(
    tmp_path, make_checkpoint, config_of, tensors_of, beacon_fields
):
    hf = config_of("qwen2", **beacon_fields)
    tensors = tensors_of(hf)
    from_hf(make_checkpoint(hf), tmp_path / "ours")
    variables = load(tmp_path / "ours").variables
    attention = variables["params"]["layers"]["attention"]
    layer = "model.layers.1.self_attn"
    x = np.random.default_rng(1).normal(size=16).astype(np.float32)
    q = np.einsum("d,dnh->nh", x, attention["q_proj"]["kernel"][1])
    q = q + attention["q_proj"]["bias"][1]
    expected = tensors[f"{layer}.q_proj.weight"] @ x + tensors[f"{layer}.q_proj.bias"]
    np.testing.assert_allclose(q.reshape(-1), expected, rtol=1e-5, atol=1e-6)
    o = np.einsum("nh,nhd->d", q, attention["o_proj"]["kernel"][1])
    expected = tensors[f"{layer}.o_proj.weight"] @ expected
    np.testing.assert_allclose(o, expected, rtol=1e-5, atol=1e-5)
    beacon = variables["beacon"]["layers"]["attention"]["k_proj"]["kernel"][2]
    expected = tensors["model.layers.2.self_attn.beacon_k_proj.weight"]
    np.testing.assert_array_equal(beacon.reshape(16, -1).T, expected)
    head = variables["params"]["lm_head"]["kernel"]
    np.testing.assert_array_equal(head.T, tensors["lm_head.weight"])


def test_tensors_larger_than_a_block_are_whole(
    tmp_path, make_checkpoint, config_of, beacon_fields, monkeypatch
):
    monkeypatch.setattr("beacon_jax.hf.reader.BLOCK_BYTES", 100)
    monkeypatch.setattr("beacon_jax.hf.conversion.BLOCK_BYTES", 100)
    src = make_checkpoint(config_of("llama", **beacon_fields), dtype=np.float16)
    from_hf(src, tmp_path / "ours")
    to_hf(tmp_path / "ours", tmp_path / "back")
    assert files_of(tmp_path / "back") == files_of(src)


@pytest.mark.parametrize("shards", [1, 2])
def test_a_cast_rounds_once_and_the_written_config_says_so(
    tmp_path, make_checkpoint, config_of, tensors_of, shards
):
    hf = config_of("llama")
    src = make_checkpoint(hf, shards=shards)
    from_hf(src, tmp_path / "ours", dtype="bfloat16")
    to_hf(tmp_path / "ours", tmp_path / "back")
    found = tensors_in(tmp_path / "back")
    for key, value in tensors_of(hf).items():
        np.testing.assert_array_equal(found[key], value.astype(ml_dtypes.bfloat16))
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert config == hf | {"torch_dtype": "bfloat16"}
    assert tree_hash(load(tmp_path / "back").variables["params"]) == tree_hash(
        load(tmp_path / "ours").variables["params"]
    )


def test_harmless_and_repeated_tensors_are_accepted(
    tmp_path, make_checkpoint, config_of, tensors_of
):
    hf = config_of("llama", tie_word_embeddings=True)
    tensors = tensors_of(hf)
    inv_freq = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(3, np.float32)}
    head = {"lm_head.weight": tensors["model.embed_tokens.weight"]}
    src = make_checkpoint(hf, tensors | head | inv_freq, shards=2)
    from_hf(src, tmp_path / "ours")
    to_hf(tmp_path / "ours", tmp_path / "back")
    found = tensors_in(tmp_path / "back")
    assert set(found) == set(tensors | head)
    index = json.loads((tmp_path / "back/model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(found)
    assert index["metadata"]["total_size"] == sum(x.nbytes for x in found.values())


def test_a_base_checkpoint_with_a_beacon_config_comes_back_without_beacons(
    tmp_path, make_checkpoint, config_of, tensors_of, beacon_fields
):
    hf = config_of("qwen2", **beacon_fields)
    src = make_checkpoint(hf, tensors_of(config_of("qwen2")))
    from_hf(src, tmp_path / "ours")
    to_hf(tmp_path / "ours", tmp_path / "back")
    assert files_of(tmp_path / "back") == files_of(src)


def test_layers_of_different_dtypes_need_a_cast(
    tmp_path, make_checkpoint, config_of, tensors_of
):
    hf = config_of("llama")
    tensors = tensors_of(hf)
    key = "model.layers.1.mlp.up_proj.weight"
    tensors[key] = tensors[key].astype(np.float16)
    src = make_checkpoint(hf, tensors)
    with pytest.raises(ValueError, match=r"float16.*float32.*--dtype"):
        from_hf(src, tmp_path / "ours")
    from_hf(src, tmp_path / "ours", dtype="float32")


def test_a_failed_conversion_leaves_nothing(tmp_path, make_checkpoint, config_of):
    src = make_checkpoint(config_of("llama"))
    before = set(tmp_path.iterdir())

    def fail(*_):
        raise RuntimeError("power cut")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("beacon_jax.hf.conversion.transposed_blocks", fail)
        with pytest.raises(RuntimeError, match="power cut"):
            from_hf(src, tmp_path / "ours")
    assert set(tmp_path.iterdir()) == before


def killed(folder, name=".ours.x1.partial"):
    """What a killed run leaves beside a folder `ours`."""
    place = folder / name
    for file, content in {"beacon_jax.lock": "", "new/a.safetensors": "half"}.items():
        (place / file).parent.mkdir(parents=True, exist_ok=True)
        (place / file).write_text(content)
    return place


def test_what_a_killed_conversion_left_is_no_checkpoint_and_goes_with_the_next(
    tmp_path, make_checkpoint, config_of, caplog
):
    src = make_checkpoint(config_of("llama"))
    left, other = killed(tmp_path), killed(tmp_path, ".another.x.partial")
    running, moved = (killed(tmp_path, f".ours.{x}.partial") for x in ("run", "old"))
    (moved / "old").mkdir()  # what was at `ours` when the run was killed
    with (running / "beacon_jax.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        from_hf(src, tmp_path / "ours")
    assert not left.exists()
    assert all(x.exists() for x in (other, running, moved))
    assert f"{moved / 'old'} has what was at {tmp_path / 'ours'}" in caplog.text
    load(tmp_path / "ours")


@pytest.mark.parametrize("overwrite", [False, True])
def test_folders_of_the_user_beside_the_destination_stay(
    tmp_path, make_checkpoint, config_of, overwrite
):
    src, dst = make_checkpoint(config_of("llama")), tmp_path / "ours"
    if overwrite:
        from_hf(src, dst)
    names = (
        ".ours.partial",
        ".ours.old",
        ".ours.1.partial",
        "ours.partial",
        "ours.old",
    )
    for name in names:
        (tmp_path / name).mkdir()
        (tmp_path / name / "thesis.txt").write_text("mine")
    from_hf(src, dst, overwrite=overwrite)
    for name in names:
        assert (tmp_path / name / "thesis.txt").read_text() == "mine"
    load(dst)
    assert {x.name for x in tmp_path.iterdir()} == {*names, "ours", "hf"}


@pytest.mark.parametrize("name", ["n" * 250, "\N{HIRAGANA LETTER A}" * 85])
def test_a_long_name_of_a_folder_is_no_obstacle(
    tmp_path, make_checkpoint, config_of, name
):
    src = make_checkpoint(config_of("llama"))
    from_hf(src, tmp_path / name)
    from_hf(src, tmp_path / name, overwrite=True)
    assert {x.name for x in tmp_path.iterdir()} == {name, "hf"}
    with pytest.raises(ValueError, match=r"--dst=.*at most 255 bytes, this one 256"):
        from_hf(src, tmp_path / ("n" * 256))


def test_a_destination_that_cannot_be_put_in_place_leaves_the_old_one(
    tmp_path, make_checkpoint, config_of, monkeypatch
):
    src, dst = make_checkpoint(config_of("llama")), tmp_path / "ours"
    from_hf(src, dst)
    before, rename = files_of(dst), Path.rename

    def fail(self, target):
        if self.name == "new":
            raise OSError(errno.EBUSY, "Device or resource busy")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(OSError, match="busy"):
        from_hf(src, dst, overwrite=True)
    assert files_of(dst) == before
    assert {x.name for x in tmp_path.iterdir()} == {"ours", "hf"}


def test_a_full_destination_is_kept_unless_told_otherwise(
    tmp_path, make_checkpoint, config_of
):
    src = make_checkpoint(config_of("llama"))
    dst = tmp_path / "ours"
    from_hf(src, dst)
    before = files_of(dst)
    with pytest.raises(FileExistsError, match=r"--dst=.*ours.*--overwrite"):
        from_hf(src, dst)
    assert files_of(dst) == before
    (dst / "modeling_other.py").write_text("")  # of another model
    from_hf(src, dst, dtype="float16", overwrite=True)
    assert not (dst / "modeling_other.py").exists()
    assert load(dst).variables["params"]["final_norm"]["scale"].dtype == np.float16
    home = tmp_path / "home"
    home.mkdir()
    (home / "thesis.txt").write_text("years")
    with pytest.raises(FileExistsError, match="not a checkpoint"):
        from_hf(src, home, overwrite=True)
    assert (home / "thesis.txt").read_text() == "years"
    with pytest.raises(ValueError, match="same folder"):
        from_hf(src, src, overwrite=True)


@pytest.mark.parametrize(
    "name",
    [
        *("notes.txt", ".git/HEAD", "checkpoint-5/model.safetensors", "train.jsonl"),
        *("optimizer.pt", "training_args.bin", "adapter.safetensors", "tf_model.h5"),
        *("model.gguf", "onnx/model.onnx"),
    ],
)
def test_files_of_the_user_are_not_overwritten(
    name, tmp_path, make_checkpoint, config_of
):
    src, dst = make_checkpoint(config_of("llama")), tmp_path / "ours"
    from_hf(src, dst)
    (dst / name).parent.mkdir(parents=True, exist_ok=True)
    (dst / name).write_text("years")
    before = files_of(dst)
    with pytest.raises(FileExistsError, match=f"more than a checkpoint.*{name}.*move"):
        from_hf(src, dst, overwrite=True)
    assert files_of(dst) == before


def test_weights_that_an_index_names_are_overwritten(
    tmp_path, make_checkpoint, config_of
):
    src, dst = make_checkpoint(config_of("llama")), tmp_path / "ours"
    from_hf(src, dst)
    (dst / "a").mkdir()
    (dst / "a" / "part.safetensors").write_bytes(b"old")
    index = {"weight_map": {"x": "a/part.safetensors"}}
    (dst / "model.safetensors.index.json").write_text(json.dumps(index))
    (dst / "pytorch_model-00001-of-00002.bin").write_bytes(b"old")
    from_hf(src, dst, overwrite=True)
    assert not {"a", "pytorch_model-00001-of-00002.bin"} & set(files_of(dst))


def test_a_source_inside_of_the_destination_stays(make_checkpoint, config_of):
    outer = make_checkpoint(config_of("llama"))
    inner = outer / "checkpoint-5"
    shutil.copytree(outer, inner)
    before = files_of(outer)
    with pytest.raises(ValueError, match="--src=.*lies in --dst="):
        from_hf(inner, outer, overwrite=True)
    assert files_of(outer) == before


def test_a_link_as_destination_stays_one(tmp_path, make_checkpoint, config_of):
    src, real, link = (
        make_checkpoint(config_of("llama")),
        tmp_path / "a",
        tmp_path / "b",
    )
    from_hf(src, real)
    link.symlink_to(real)
    from_hf(src, link, dtype="float16", overwrite=True)
    assert link.is_symlink() and not list(tmp_path.glob(".*"))
    assert load(real).variables["params"]["final_norm"]["scale"].dtype == np.float16


@pytest.mark.parametrize("pointer", [True, False])
def test_what_stands_for_a_tokenizers_file_is_not_copied(
    pointer, tmp_path, make_checkpoint, config_of
):
    src = make_checkpoint(config_of("llama"))
    (src / "tokenizer.json").unlink(missing_ok=True)
    if pointer:
        (src / "tokenizer.json").write_text(
            "version https://git-lfs.github.com/spec/v1"
        )
    else:
        (src / "tokenizer.json").symlink_to(tmp_path / "gone")
    with pytest.raises(ValueError, match="tokenizer.json is a (pointer|link)"):
        from_hf(src, tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


def test_pytorch_files_convert_where_torch_is_installed(
    tmp_path, make_checkpoint, config_of, tensors_of
):
    torch = pytest.importorskip("torch")
    hf = config_of("llama")
    src = make_checkpoint(hf)
    (src / "model.safetensors").unlink()
    tensors = {k: torch.from_numpy(v).bfloat16() for k, v in tensors_of(hf).items()}
    torch.save(tensors, src / "pytorch_model.bin")
    from_hf(src, tmp_path / "ours")
    to_hf(tmp_path / "ours", tmp_path / "back")
    found = load_file(tmp_path / "back" / "model.safetensors")
    for key, value in tensors.items():
        np.testing.assert_array_equal(
            found[key].astype(np.float32), value.float().numpy()
        )


def test_pytorch_files_without_torch_name_the_remedy(
    tmp_path, make_checkpoint, config_of, monkeypatch
):
    src = make_checkpoint(config_of("llama"))
    (src / "model.safetensors").rename(src / "pytorch_model.bin")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pytorch_model\.bin.*pip install torch"):
        from_hf(src, tmp_path / "ours")


def test_two_files_with_the_same_tensor_are_refused(
    tmp_path, make_checkpoint, config_of, tensors_of
):
    hf = config_of("llama")
    src = make_checkpoint(hf, shards=2)
    second = src / "model-00002-of-00002.safetensors"
    extra = {"model.norm.weight": np.ones(16, np.float32)}
    for path in src.glob("model-*.safetensors"):
        save_file(load_file(path) | extra, path)
    with pytest.raises(ValueError, match=rf"model\.norm\.weight.*{second.name}"):
        from_hf(src, tmp_path / "ours")
