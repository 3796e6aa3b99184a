"""Beacon packs: what is saved is what is loaded, and nothing else is."""

import dataclasses
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh, PartitionSpec
from safetensors.numpy import save_file

from beacon_jax.hf import Identity
from beacon_jax.hf.writer import safetensors_header
from beacon_jax.inference import leaves, packs
from beacon_jax.inference.memory import Memory
from beacon_jax.inference.packs import PackError
from beacon_jax.model.quantize import Quantized
from beacon_jax.training.initial import random_variables
from tests.inference.memories import (
    CONFIG,
    assert_same_live,
    random_memory,
    read,
    tokens_of,
    with_biases,
)

RAGGED = (37, 3, 16)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "text.beacon"


def model(config=CONFIG, base="a" * 64, beacon="b" * 64):
    return SimpleNamespace(config=config, identity=Identity(base, beacon))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("lengths", [(24,), RAGGED], ids=["one row", "ragged"])
def test_what_is_loaded_is_bit_identical(path, dtype, lengths):
    memory = random_memory(lengths, dtype=dtype)
    memory.save(path, overwrite=True)
    again = Memory.load(path, model())
    assert_same_live(again, memory)
    assert again.config == memory.config and again.identity == memory.identity
    assert isinstance(again.state.k, jax.Array)


@settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    lengths=st.lists(st.integers(0, 60), min_size=1, max_size=3),
    plan=st.lists(st.sampled_from([0, 2, 4, 8]), min_size=1, max_size=4),
    sink=st.integers(0, 2),
    placement=st.sampled_from(["interleave", "append"]),
    tokens=st.booleans(),
    biases=st.booleans(),
)
def test_any_memory_survives_and_saves_to_the_same_bytes_again(
    tmp_path, lengths, plan, sink, placement, tokens, biases
):
    beacon = dataclasses.replace(CONFIG.beacon, sink=sink, placement=placement)
    config = dataclasses.replace(CONFIG, beacon=beacon)
    memory = random_memory(lengths, config=config, plan=plan, capacity=80)
    if biases:
        memory = with_biases(memory)
    first, second = tmp_path / "first", tmp_path / "second"
    memory.save(first, tokens=tokens, overwrite=True)
    again = Memory.load(first)
    if not tokens:
        rows = tuple(row.forget_tokens() for row in memory.rows)
        memory = dataclasses.replace(memory, rows=rows)
    assert_same_live(again, memory)
    if tokens:
        again.save(second, overwrite=True)
        assert first.read_bytes() == second.read_bytes()


def test_a_loaded_memory_is_continued_like_the_one_that_was_saved(path):
    variables = jax.tree.map(jnp.asarray, random_variables(CONFIG, 0))
    _, memory = read(CONFIG, variables, [tokens_of(21), tokens_of(12)], (4,))
    memory.save(path, overwrite=True)
    more = [tokens_of(5, 7), tokens_of(9, 8)]
    want, _ = read(CONFIG, variables, more, (4,), memory)
    got, after = read(CONFIG, variables, more, (4,), Memory.load(path))
    np.testing.assert_array_equal(got, want)
    assert after.slots.tolist() == np.asarray(after.state.slots).tolist()


def test_the_manifest_says_what_the_pack_is_of(path):
    memory = random_memory(RAGGED)
    memory.save(path, overwrite=True)
    manifest = packs.read_manifest(path)
    assert manifest["model"]["base"] == "a" * 64
    assert manifest["model"]["config"]["num_layers"] == CONFIG.num_layers
    assert manifest["dtype"] == "float32"
    row = manifest["rows"][0]
    assert (row["tokens"], row["slots"], row["raw"], row["windows"]) == (37, 10, 5, 4)
    assert row["entries"] == 10 + 5 + 1  # one beacon behind 4 of the 5 raw tokens
    same = random_memory((37,), seed=0)
    same.save(path, overwrite=True)
    assert packs.read_manifest(path)["rows"][0]["text_sha256"] == row["text_sha256"]
    # Any safetensors reader finds the manifest, without the tensors.
    size = int.from_bytes(path.read_bytes()[:8], "little")
    header = json.loads(path.read_bytes()[8 : 8 + size])
    assert json.loads(header["__metadata__"]["manifest"])["rows"][0]["slots"] == 10


def test_biases_are_stored_with_a_version_of_their_own(path):
    memory = with_biases(random_memory((37, 16)))
    memory.save(path, overwrite=True)
    manifest = packs.read_manifest(path)
    assert manifest["dtype"] == "float32" and manifest["biased"] is True
    assert manifest["tensors"]["state.k.entries/0"]["shape"] == [2, 16, 2, 8]
    assert manifest["tensors"]["state.k.bias/1"]["shape"] == [2, 2, 6]
    assert b'"beacon_pack":"3"' in path.read_bytes()
    assert_same_live(Memory.load(path), memory)
    # Eight float32 channels of a key and of a value, and a bias.
    assert memory.slot_nbytes == 2 * 2 * (2 * 8 * 4 + 4)
    assert with_biases(random_memory((9,), dtype="bfloat16")).dtype == "bfloat16"


def test_unused_capacity_is_not_stored(path):
    small, large = random_memory((37,), capacity=40), random_memory((37,), capacity=400)
    small.save(path, overwrite=True)
    size = path.stat().st_size
    large.save(path, overwrite=True)
    assert path.stat().st_size == size
    live = 16 * small.slot_nbytes
    assert live < size < live + 6000


def test_without_tokens_no_ids_are_stored_but_those_of_the_open_window(path):
    memory = random_memory((37, 16))
    memory.save(path, tokens=False, overwrite=True)
    again = Memory.load(path)
    assert [row.tokens for row in again.rows] == [None, None]
    manifest = packs.read_manifest(path)
    assert not [name for name in manifest["tensors"] if name.startswith("row.tokens")]
    assert np.asarray(again.state.tokens)[0, 5:].tolist() == [0, 0, 0]
    assert np.asarray(again.state.tokens)[1].tolist() == [0] * 8
    with pytest.raises(ValueError, match="tokens were not kept"):
        again[0].truncate(30)


def test_pending_tokens_are_saved_and_needed(path):
    memory = random_memory((37,)).truncate(30)
    memory.save(path, overwrite=True)
    again = Memory.load(path)
    assert again.rows[0].pending.tolist() == memory.rows[0].pending.tolist()
    assert again.lengths.tolist() == [30]
    with pytest.raises(ValueError, match="6 tokens are still to be fed"):
        memory.save(path, tokens=False, overwrite=True)


@settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))
@given(at=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_a_flipped_bit_anywhere_is_found(tmp_path, at, bit):
    path = tmp_path / "a.beacon"
    if not path.exists():
        random_memory((13,)).save(path, overwrite=True)
    data = bytearray(path.read_bytes())
    data[int(at * len(data))] ^= 1 << bit
    broken = tmp_path / "broken.beacon"
    broken.write_bytes(data)
    with pytest.raises(PackError, match=r"broken\.beacon.*(Copy|Give|compress)"):
        Memory.load(broken)


def test_every_bit_of_the_header_s_first_bytes_and_end_is_checked(tmp_path):
    path, broken = tmp_path / "a.beacon", tmp_path / "broken.beacon"
    random_memory((13,)).save(path, overwrite=True)
    data = path.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    for at in (*range(60), *range(end - 60, end)):
        for bit in range(8):
            changed = bytearray(data)
            changed[at] ^= 1 << bit
            broken.write_bytes(changed)
            with pytest.raises(PackError, match="broken"):
                Memory.load(broken)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(left=st.floats(0, 1, exclude_max=True))
def test_a_cut_file_is_found(tmp_path, left):
    path = tmp_path / "a.beacon"
    if not path.exists():
        random_memory((13,)).save(path, overwrite=True)
    data = path.read_bytes()
    broken = tmp_path / "broken.beacon"
    broken.write_bytes(data[: int(left * len(data))])
    with pytest.raises(PackError, match=r"broken\.beacon is (truncated|not a beacon)"):
        Memory.load(broken)
    with pytest.raises(PackError):
        packs.read_manifest(broken)


def test_bytes_behind_the_end_are_found(path):
    random_memory((13,)).save(path, overwrite=True)
    path.write_bytes(path.read_bytes() + b"\0")
    with pytest.raises(PackError, match="too long"):
        Memory.load(path)


def test_what_is_no_pack_is_said_to_be_none(tmp_path, path):
    rng = np.random.default_rng(0)
    for data in (b"", b"{}", b"hello, this is a text", rng.bytes(5000), b"[" * 4000):
        path.write_bytes(data)
        with pytest.raises(PackError, match="text.beacon is.* no"):
            Memory.load(path)
    save_file({"weight": np.zeros(3, np.float32)}, path, {"format": "pt"})
    with pytest.raises(PackError, match="not a beacon pack.*memory.save wrote"):
        Memory.load(path)
    with pytest.raises(PackError, match="is a folder"):
        Memory.load(tmp_path)
    with pytest.raises(FileNotFoundError, match="absent.beacon is not there"):
        Memory.load(tmp_path / "absent.beacon")


def resealed(path, keys, value):
    """Writes a pack anew, with another value in its manifest and checksums that fit."""
    pack, data = packs._Pack(path), path.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    manifest = pack.manifest
    inner = manifest
    for key in keys[:-1]:
        inner = inner[key]
    inner[keys[-1]] = value
    metadata = packs._metadata(json.dumps(manifest, separators=(",", ":")), pack.has)
    path.write_bytes(safetensors_header(pack.tensors, metadata) + data[end:])


@pytest.mark.parametrize(
    ("keys", "value", "message"),
    [
        (("library",), None, "manifest.library is None, not a text"),
        (("model", "base"), 3, "manifest.model.base is 3, not a text or null"),
        (("model", "config"), [], r"manifest.model.config is \[\], not an object"),
        (("model", "config", "rope"), 7, "whose model config is another one"),
        (("model", "config", "num_layers"), -1, "another one .*num_layers=-1 must be"),
        (("model", "config", "num_layers"), 3, "tensor state.k/0 does not fit"),
        (("dtype",), "float31", "manifest.dtype is 'float31', not one of bfloat16"),
        (("dtype",), "bfloat16", "tensor state.k/0 does not fit"),
        (("rows",), [], "manifest.rows is empty"),
        (("rows", 0, "slots"), "4", r"rows\[0\].slots is '4', not a whole number"),
        (("rows", 0, "slots"), 5, "tensor row.ratios/0 does not fit"),
        (("rows", 0, "windows"), 0, "tensor row.marks/0 does not fit"),
        (("rows", 0, "entries"), 10**30, "tensor state.k/0 does not fit"),
        (("rows", 0, "tokens"), 12, "tensor row.tokens/0 does not fit"),
        (("rows", 0, "raw"), 4, "its manifest counts row 0 otherwise than it is"),
        (("rows", 0, "ratio"), 2, "its manifest counts row 0 otherwise than it is"),
        (
            ("rows", 0, "recent"),
            {"own": None, "fixed": 0},
            "format version|not the one",
        ),
        (("biased",), True, "format version|not the one"),
        (("biased",), 1, "manifest.biased is 1, not true or false"),
        (("tensors",), {}, "its header is not the one that was written"),
        (("tensors", "state.raw", "dtype"), "I31", "no tensors such as 'state.raw'"),
        (("tensors", "state.raw", "shape"), [-1], r"shape\[0\] is -1, not a whole"),
        (
            ("tensors", "état"),
            {"dtype": "I32", "shape": [], "sha256": ""},
            "no tensors",
        ),
        (
            ("tensors", "state.raw", "sha256"),
            "",
            "state.raw does not have its checksum",
        ),
    ],
)
def test_a_manifest_that_contradicts_its_pack_is_refused(path, keys, value, message):
    random_memory((13,), plan=(2, 4)).save(path, overwrite=True)
    resealed(path, keys, value)
    with pytest.raises(PackError, match=f"text.beacon.*{message}"):
        Memory.load(path)


@pytest.mark.parametrize("text", ["", "[", "7", "null", "[" * 100_000, "9" * 5000])
def test_a_manifest_that_is_no_object_is_refused(path, text):
    random_memory((13,)).save(path, overwrite=True)
    tensors, data = packs._Pack(path).tensors, path.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    header = safetensors_header(
        tensors, packs._metadata(text, dict(recent=False, biased=False))
    )
    path.write_bytes(header + data[end:])
    with pytest.raises(PackError, match=r"text\.beacon is damaged: .*manifest"):
        Memory.load(path)


@pytest.mark.parametrize(
    ("version", "remedy"), [("4", "install a newer"), ("0", "compress the text again")]
)
def test_another_format_version_is_named_with_what_to_do(path, version, remedy):
    random_memory((13,)).save(path, overwrite=True)
    data = path.read_bytes()
    path.write_bytes(
        data.replace(b'"beacon_pack":"1"', f'"beacon_pack":"{version}"'.encode())
    )
    with pytest.raises(
        PackError, match=f"version {version}, .* reads 1 and 2 and 3: {remedy}"
    ):
        Memory.load(path)


def test_a_config_of_another_library_version_is_named(path, monkeypatch):
    monkeypatch.setattr("beacon_jax.__version__", "9.0")
    plain = dataclasses.asdict
    added = lambda config: plain(config) | {"attention_sinks": 4}
    monkeypatch.setattr(packs.dataclasses, "asdict", added)
    random_memory((13,)).save(path, overwrite=True)
    with pytest.raises(PackError, match="beacon_jax 9.0.*attention_sinks.*install"):
        Memory.load(path)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (model(base="c" * 64), "base weights: a{64} in the pack, c{64} in the model"),
        (model(beacon="c" * 64), "beacon weights: b{64} in the pack, c{64} in the mod"),
        (model(base=None), "base weights: a{64} in the pack, unknown in the model"),
        (
            model(dataclasses.replace(CONFIG, num_kv_heads=4)),
            "config.num_kv_heads: 2 in the pack, 4 in the model",
        ),
        (model(dataclasses.replace(CONFIG, beacon=None)), "config.beacon: Beacon"),
        (
            model(
                dataclasses.replace(
                    CONFIG, beacon=dataclasses.replace(CONFIG.beacon, sink=1)
                )
            ),
            "config.beacon.sink: 0 in the pack, 1 in the model",
        ),
    ],
)
def test_another_model_is_refused_saying_what_differs(path, other, message):
    random_memory((13,)).save(path, overwrite=True)
    with pytest.raises(PackError, match=f"(?s)text.beacon was written by.*{message}"):
        Memory.load(path, other)


def test_only_what_differs_is_named_and_other_weights_can_be_allowed(path):
    random_memory((13,)).save(path, overwrite=True)
    with pytest.raises(PackError, match="allow_other_model=True") as error:
        Memory.load(path, model(beacon="c" * 64))
    assert "base weights" not in str(error.value)
    other = model(beacon="c" * 64)
    assert Memory.load(path, other, allow_other_model=True).identity is other.identity
    wide = model(dataclasses.replace(CONFIG, num_kv_heads=4))
    with pytest.raises(PackError, match="num_kv_heads"):
        Memory.load(path, wide, allow_other_model=True)


def test_ratios_that_a_model_draws_from_and_its_end_tokens_do_not_matter(path):
    random_memory((13,)).save(path, overwrite=True)
    beacon = dataclasses.replace(CONFIG.beacon, ratios=(8,), ratio_mix="sequence")
    other = dataclasses.replace(CONFIG, beacon=beacon, eos_ids=(2, 5))
    assert Memory.load(path, model(other)).config == other


def test_hashes_are_not_computed_without_a_model_to_compare_with(path):
    random_memory((13,)).save(path, overwrite=True)
    never = Identity(lambda: pytest.fail("base"), lambda: pytest.fail("beacon"))
    assert Memory.load(path).lengths.tolist() == [13]
    wide = dataclasses.replace(CONFIG, num_kv_heads=4)
    with pytest.raises(PackError, match="num_kv_heads"):  # the config is enough
        Memory.load(path, SimpleNamespace(config=wide, identity=never))


@pytest.mark.parametrize("stage", ["write", "rename"])
def test_an_interrupted_save_leaves_the_old_pack_and_nothing_else(
    path, monkeypatch, stage
):
    old = random_memory((13,))
    old.save(path, overwrite=True)
    before = path.read_bytes()

    def stop(*_, **__):
        raise KeyboardInterrupt

    if stage == "write":
        write = packs.write_safetensors

        def half(target, *args):
            write(target, *args)
            os.truncate(target, 100)
            stop()

        monkeypatch.setattr(packs, "write_safetensors", half)
    else:
        monkeypatch.setattr("pathlib.Path.replace", stop)
    with pytest.raises(KeyboardInterrupt):
        random_memory((30,)).save(path, overwrite=True)
    monkeypatch.undo()
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]
    assert_same_live(Memory.load(path), old)


def test_a_pack_is_readable_by_those_whom_the_umask_lets(path):
    mask = os.umask(0o022)
    try:
        random_memory((13,)).save(path, overwrite=True)
    finally:
        os.umask(mask)
    assert path.stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize(
    ("shape", "rows", "spec"),
    [
        ((4, 2), (*RAGGED, 8), PartitionSpec(None, "data", None, "tensor", None)),
        ((1, 2), RAGGED, PartitionSpec(None, None, None, "tensor", None)),
        (
            (2, 4),
            RAGGED,
            PartitionSpec(None, None, None, None, None),
        ),  # 3 rows, 2 heads
        ((8, 1), RAGGED, PartitionSpec(None, None, None, None, None)),
    ],
)
def test_a_pack_is_loaded_onto_any_mesh(path, shape, rows, spec):
    memory = random_memory(rows, dtype="bfloat16")
    memory.save(path, overwrite=True)
    devices = np.asarray(jax.devices()[: shape[0] * shape[1]]).reshape(shape)
    mesh = Mesh(devices, ("data", "tensor"))
    again = Memory.load(path, mesh=mesh)
    assert again.state.k.sharding.is_equivalent_to(
        jax.sharding.NamedSharding(mesh, spec), 5
    )
    assert len(again.state.slots.sharding.device_set) == devices.size
    assert_same_live(again, memory)
    again.save(path, overwrite=True)  # and back from there
    assert_same_live(Memory.load(path), memory)


def quantized(memory, seed=0):
    rng = np.random.default_rng(seed)
    layers, rows, slots, heads, width = memory.state.k.shape

    def buffer():
        return Quantized(
            jnp.asarray(rng.integers(-127, 127, memory.state.k.shape), jnp.int8),
            jnp.asarray(rng.random((layers, rows, heads, slots)), jnp.float32),
            jnp.asarray(rng.random((layers, rows, heads, width)), jnp.float32),
        )

    return memory.state.replace(k=buffer(), v=buffer())


@pytest.mark.parametrize("mesh", [None, (2, 2)])
def test_leaves_of_an_int8_memory_are_cut_and_put_back(path, monkeypatch, mesh):
    memory = random_memory((37, 16))
    memory = dataclasses.replace(memory, state=quantized(memory))
    memory.save(path, overwrite=True)
    manifest = packs.read_manifest(path)
    assert manifest["dtype"] == "int8"
    assert manifest["tensors"]["state.k.values/0"]["shape"] == [2, 16, 2, 8]
    assert manifest["tensors"]["state.k.scale/1"]["shape"] == [2, 2, 6]
    make = lambda config, rows, capacity, dtype, **has: quantized(
        random_memory((1,) * rows, capacity=capacity)
    )
    monkeypatch.setattr(leaves, "init_memory", make)
    if mesh:
        mesh = Mesh(np.asarray(jax.devices()[:4]).reshape(mesh), ("data", "tensor"))
    state = Memory.load(path, mesh=mesh).state
    for side in ("k", "v"):
        a, b = getattr(state, side), getattr(memory.state, side)
        np.testing.assert_array_equal(a.mean, b.mean)
        for row, live in enumerate((16, 6)):
            np.testing.assert_array_equal(
                np.asarray(a.values)[:, row, :live], np.asarray(b.values)[:, row, :live]
            )
            np.testing.assert_array_equal(
                np.asarray(a.scale)[:, row, :, :live],
                np.asarray(b.scale)[:, row, :, :live],
            )


def test_a_config_of_no_rank_is_written_as_before_there_was_one(path):
    memory = random_memory((13,))
    memory.save(path, overwrite=True)
    assert "rank" not in packs._Pack(path).manifest["model"]["config"]["beacon"]
    beacon = dataclasses.replace(memory.config.beacon, rank=2)
    config = dataclasses.replace(memory.config, beacon=beacon)
    low = Memory(config, memory.state, memory.rows, memory.identity)
    low.save(path, overwrite=True)
    assert packs._Pack(path).config() == config


def test_the_header_is_what_the_library_would_write(path):
    random_memory((13,)).save(path, overwrite=True)
    pack = packs._Pack(path)
    manifest = json.dumps(pack.manifest, separators=(",", ":"))
    metadata = packs._metadata(manifest, pack.has)
    header = safetensors_header(pack.tensors, metadata)
    assert path.read_bytes().startswith(header)


MEASURE = """
import re, sys
from beacon_jax.inference.memory import Memory
def status(key):
    text = open("/proc/self/status").read()
    return 1024 * int(re.search(key + r":\\s+(\\d+)", text)[1])
Memory.load(sys.argv[1])
before = status("VmRSS")
memory = Memory.load(sys.argv[2])
print(memory.nbytes, status("VmHWM") - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="peak of Linux")
def test_loading_takes_less_than_twice_the_memory(tmp_path):
    small, large = tmp_path / "small.beacon", tmp_path / "large.beacon"
    random_memory((13,)).save(small, overwrite=True)
    wide = dataclasses.replace(CONFIG, head_dim=64, num_kv_heads=4, num_layers=4)
    memory = random_memory((48_000,), config=wide, plan=(2,), capacity=24_100)
    memory.save(large)
    assert large.stat().st_size > 190e6
    out = subprocess.run(
        [sys.executable, "-c", MEASURE, str(small), str(large)],
        capture_output=True,
        text=True,
        check=True,
    )
    loaded, peak = map(int, out.stdout.split())
    assert loaded < 1.1 * large.stat().st_size
    # 1.69: one of two leaves is on the host while it is copied to the device, and of
    # the file one layer is mapped.
    assert peak < 1.85 * loaded


def test_a_file_is_replaced_only_if_asked_and_nothing_but_a_file(tmp_path):
    memory, path = random_memory((13,)), tmp_path / "a.beacon"
    memory.save(path)
    before = path.read_bytes()
    link, pipe = tmp_path / "link.beacon", tmp_path / "pipe"
    link.symlink_to(path)
    os.mkfifo(pipe)
    for taken in (path, link):
        with pytest.raises(FileExistsError, match="overwrite=True"):
            random_memory((7,)).save(taken)
    assert path.read_bytes() == before
    for bad, message in ((pipe, "pipe"), (tmp_path, "is a folder"), ("", "no file")):
        with pytest.raises(ValueError, match=message):
            memory.save(bad, overwrite=True)
    for name, data in (
        ("model.safetensors", b"\2\0\0\0\0\0\0\0{}"),
        ("a.txt", b"mine"),
    ):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(FileExistsError, match=f"{name} is no beacon pack"):
            memory.save(tmp_path / name, overwrite=True)
        assert (tmp_path / name).read_bytes() == data
    random_memory((7,)).save(link, overwrite=True)  # behind the link
    assert link.is_symlink() and path.read_bytes() != before
