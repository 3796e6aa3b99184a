"""GGUF files as models: their tensors, their config.json, and what is refused."""

import json
import subprocess
import sys
from pathlib import Path

import gguf
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

import beacon_jax
from beacon_jax import hf
from beacon_jax.data.prepare import tokenizer_hash
from beacon_jax.hf import conversion, hub
from beacon_jax.hf.gguf import GgufReader, config
from beacon_jax.hf.reader import open_hf
from beacon_jax.inference import verify
from beacon_jax.model.config import ModelConfig
from tests.hf.gguf_files import byte_level, gguf_tensors, metadata, write_gguf

ROOT = Path(__file__).parents[2]
TYPES = gguf.GGMLQuantizationType
# Rows of 32 and more, as blocks need: N * H != D on purpose.
SIZES = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 8, "vocab_size": 300}
TOKENIZER = byte_level(["abc", " def"], "gpt-2")
UNUSED = 300 - len(TOKENIZER["tokenizer.ggml.tokens"])
TOKENIZER["tokenizer.ggml.tokens"] += [f"[PAD{i}]" for i in range(UNUSED)]
TOKENIZER["tokenizer.ggml.token_type"] += [5] * UNUSED


def quantisable(folder_tensors):
    """Tensors of SIZES, instead of those of the small shapes of conftest."""
    rng = np.random.default_rng(1)
    grown = {"N": 4 * 8, "K": 2 * 8, 6: 8, 16: 64, 24: 96, 40: 300, 12: 16}
    return {
        key: (rng.normal(size=[grown[n] for n in _axes(key, x.shape)]) * 0.3).astype(
            np.float32
        )
        for key, x in folder_tensors.items()
    }


def _axes(key, shape):
    # 24 is both N * H and F in conftest.
    heads = ("q_proj" in key and [24, shape[-1]]) or ("o_proj" in key and [16, 24])
    if not heads:
        return shape
    names = ["N" if n == 24 else n for n in heads]
    return names[: len(shape)]


@pytest.fixture
def pair(tmp_path, make_checkpoint, config_of, tensors_of):
    """Makes the HF folder and the GGUF file of the same weights."""

    def make(family, kinds=None, values=None, *, tokenizer=False, **changes):
        fields = config_of(family, **changes)
        tensors = tensors_of(fields)
        if kinds or tokenizer:
            fields |= SIZES
            tensors = quantisable(tensors)
        if kinds:  # the values that such a file can hold
            tensors = {k: rounded(x, kinds) for k, x in tensors.items()}
        folder = make_checkpoint(fields, tensors)
        given = {**metadata(fields), **(TOKENIZER if tokenizer else {})}
        if tokenizer:
            fields |= {"bos_token_id": 0, "eos_token_id": 1}
            (folder / "config.json").write_text(json.dumps(fields))
        named = gguf_tensors(fields, tensors)
        types = {n: kinds for n, x in named.items() if x.ndim > 1} if kinds else {}
        file = tmp_path / "model.gguf"
        given |= values or {}
        return folder, write_gguf(file, family, given, named, types)

    return make


def rounded(x, kind):
    """What is left of a matrix in a file."""
    if x.ndim == 1:
        return x
    return gguf.dequantize(gguf.quantize(x, kind), kind).reshape(x.shape)


def assert_same(a, b):
    a, b = dict(hf.keys.flatten(a)), dict(hf.keys.flatten(b))
    assert a.keys() == b.keys()
    for name, x in a.items():
        assert x.dtype == b[name].dtype, name
        np.testing.assert_array_equal(x, b[name], err_msg=name)


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {}),
        ("llama", {"tie_word_embeddings": True}),
        ("llama", {"attention_bias": True, "mlp_bias": True}),
        ("qwen2", {}),
        ("qwen2", {"tie_word_embeddings": True}),
        ("qwen3", {"tie_word_embeddings": True}),
        ("qwen3", {"attention_bias": True}),
    ],
)
def test_a_file_is_the_model_of_the_folder(pair, family, changes):
    folder, file = pair(family, **changes)
    ours, theirs = hf.load(file), hf.load(folder)
    assert_same(ours.variables, theirs.variables)
    assert ours.config == theirs.config
    assert ours.identity.base == theirs.identity.base == ours.base_hash
    assert hf.identity(file) == hf.identity(folder)


def test_rows_of_permuted_tensors_are_read_from_anywhere(pair):
    folder, file = pair("llama", attention_bias=True)
    ours, theirs = GgufReader(file), open_hf(folder)
    assert set(ours.tensors) == set(theirs.tensors)
    for key in ("q_proj.weight", "k_proj.weight", "k_proj.bias"):
        key = f"model.layers.1.self_attn.{key}"
        for rows in ((0, 1), (1, 5), (5, 8), (3, 12), (11, None), (4, 4)):
            found = ours.read(key, *rows)
            np.testing.assert_array_equal(found, theirs.read(key, *rows))


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_a_quantised_model_has_the_logits_of_its_folder(pair, family):
    folder, file = pair(family, TYPES.Q4_0, attention_bias=False)
    ours, tokens = hf.load(file), np.arange(20) * 7 % 300
    theirs = ModelConfig.from_hf(conversion.read_config(folder))
    logits = verify.jax_logits(ours.config, ours.variables, tokens)
    expected = verify.numpy_logits(theirs, open_hf(folder), tokens)
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4)


def _kinds():
    for kind in TYPES:
        try:
            size = gguf.GGML_QUANT_SIZES[kind][1]
            gguf.dequantize(np.zeros((1, size), np.uint8), kind)
            yield kind
        except NotImplementedError:
            continue


@pytest.mark.parametrize("kind", list(_kinds()), ids=lambda kind: kind.name)
def test_every_type_is_read_as_the_library_dequantises_it(
    tmp_path, monkeypatch, config_of, kind
):
    monkeypatch.setattr("beacon_jax.hf.gguf.CHUNK", 1 << 11)  # several, and a rest
    shapes = {"token_embd": (37, 256), "blk.0.attn_k": (64, 256)}
    fields = config_of(
        "llama",
        **{"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 1},
        **{"vocab_size": 37, "head_dim": 64, "num_key_value_heads": 1},
        tie_word_embeddings=True,
    )
    fields["num_attention_heads"] = 4
    block, size = gguf.GGML_QUANT_SIZES[kind]
    rng, tensors = np.random.default_rng(0), {}
    for part in ("attn_q", "attn_output", "ffn_gate", "ffn_up", "ffn_down"):
        shapes[f"blk.0.{part}"] = (256, 256)
    shapes["blk.0.attn_v"] = (64, 256)
    for name, (rows, columns) in shapes.items():
        bytes_ = rng.integers(0, 120, (rows, columns // block * size))
        tensors[f"{name}.weight"] = bytes_.astype(np.uint8)
    kinds = dict.fromkeys(tensors, kind)
    for name in ("blk.0.attn_norm", "blk.0.ffn_norm", "output_norm"):
        tensors[f"{name}.weight"] = np.ones(256, np.float32)
    file = write_gguf(tmp_path / "a.gguf", "llama", metadata(fields), tensors, kinds)
    reader = GgufReader(file)
    plain = {TYPES.F16: np.float16, TYPES.BF16: ml_dtypes.bfloat16}
    for key, name in (
        ("model.embed_tokens", "token_embd"),
        ("model.layers.0.mlp.up_proj", "blk.0.ffn_up"),
        ("model.layers.0.self_attn.k_proj", "blk.0.attn_k"),
    ):
        expected = gguf.dequantize(tensors[f"{name}.weight"], kind)
        expected = expected.reshape(shapes[name]).astype(plain.get(kind, np.float32))
        if name.endswith("attn_k"):  # one head: even rows, then odd ones
            expected = np.concatenate([expected[::2], expected[1::2]])
        found = reader.read(f"{key}.weight")
        assert found.dtype == expected.dtype
        np.testing.assert_array_equal(found, expected)
        np.testing.assert_array_equal(
            reader.read(f"{key}.weight", 9, 30), expected[9:30]
        )


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [(TYPES.BF16, "bfloat16"), (TYPES.F16, "float16"), (TYPES.Q8_0, "float32")],
)
def test_the_dtype_is_that_of_the_matrices_or_the_asked_one(pair, kind, dtype):
    _, file = pair("llama", kind)
    assert conversion.read_config(file)["torch_dtype"] == dtype
    for asked in (None, "bfloat16", "float32"):
        leaves = hf.keys.flatten(hf.load(file, dtype=asked).variables)
        assert {x.dtype.name for _, x in leaves} == {asked or dtype}


def test_a_file_with_one_other_matrix_is_float32(tmp_path, config_of, tensors_of):
    fields = config_of("qwen2")
    named = gguf_tensors(fields, tensors_of(fields))
    kinds = {name: TYPES.F16 for name, x in named.items() if x.ndim > 1}
    kinds["output.weight"] = TYPES.F32
    file = write_gguf(tmp_path / "a.gguf", "qwen2", metadata(fields), named, kinds)
    assert {t.dtype.name for t in GgufReader(file).tensors.values()} == {"float32"}


def test_a_file_is_converted_and_becomes_an_hf_folder(tmp_path, pair):
    folder, file = pair("llama", TYPES.Q8_0, tokenizer=True)
    ours, back = tmp_path / "ours", tmp_path / "back"
    conversion.from_hf(file, ours)
    found, stored = hf.load(ours), hf.load(file)
    assert_same(found.variables, stored.variables)
    assert found.config == stored.config == hf.load(folder).config
    assert found.known_hashes["base"] == stored.identity.base
    result = verify.compare(file, ours)
    assert result.passed
    conversion.to_hf(ours, back)
    expected = load_file(folder / "model.safetensors")
    made = load_file(back / "model.safetensors")
    assert made.keys() == expected.keys()
    for key, x in expected.items():
        np.testing.assert_array_equal(made[key], x)
    text = "abc def<think> </s>!"
    ids = hf.load_tokenizer(file)(text)["input_ids"]
    assert hf.load_tokenizer(back)(text)["input_ids"] == ids
    conversion.from_hf(file, tmp_path / "half", dtype="bfloat16")
    leaves = hf.keys.flatten(hf.load(tmp_path / "half").variables)
    assert {x.dtype.name for _, x in leaves} == {"bfloat16"}


def test_a_file_is_loaded_answers_and_is_exported_like_a_folder(tmp_path, pair):
    folder, file = pair("qwen2", TYPES.Q8_0, tokenizer=True)
    assert hub.find(file, "--model") == file
    model = beacon_jax.load(file)
    hf.copy_tokenizer(file, folder)
    theirs = beacon_jax.load(folder)
    said = model.complete("abc def", ratio=0, max_new_tokens=8)
    assert said.text == theirs.complete("abc def", ratio=0, max_new_tokens=8).text
    # What training with init_from does at its end.
    out = tmp_path / "export"
    stored = hf.load(file)
    hf.save_hf(out, stored.config, stored.variables, file)
    assert hf.identity(out) == hf.identity(file)
    assert hf.has_tokenizer(file) and hf.has_tokenizer(out)
    blob = tmp_path / "sha256-00"  # as some programs keep them
    blob.write_bytes(file.read_bytes())
    assert tokenizer_hash(blob) == tokenizer_hash(file) != tokenizer_hash(out)


def _values(name, factors=None, **changes):
    fields = {
        **{"model_type": "llama", "hidden_size": 64, "head_dim": 64},
        **{"num_hidden_layers": 1, "num_attention_heads": 1},
        **{"num_key_value_heads": 1, "intermediate_size": 8, "vocab_size": 4},
        **{"max_position_embeddings": 4096, "rms_norm_eps": 1e-5},
        **{"rope_theta": 500000.0, "bos_token_id": 0, "eos_token_id": 1},
    }
    values = {**metadata(fields), **changes}
    tensors = {"token_embd.weight": np.ones((4, 64), np.float32)}
    if factors is not None:
        tensors["rope_freqs.weight"] = np.asarray(factors, np.float32)
    return config(write_gguf(name, "llama", values, tensors))


def llama3_factors(factor, low, high, original, dim=64, theta=500000.0):
    """As llama.cpp's converter computes the tensor."""
    factors = []
    for freq in 1.0 / theta ** (np.arange(0, dim, 2) / dim):
        wavelength = 2 * np.pi / freq
        if wavelength < original / high:
            factors.append(1.0)
        elif wavelength > original / low:
            factors.append(factor)
        else:
            smooth = (original / wavelength - low) / (high - low)
            factors.append(1 / ((1 - smooth) / factor + smooth))
    return factors


@pytest.mark.parametrize(
    "given", [(8.0, 1.0, 4.0, 8192), (32.0, 1.0, 4.0, 8192), (4.0, 1.0, 6.5, 10000)]
)
def test_scaling_is_recognised_in_rope_freqs(tmp_path, given):
    scaling = _values(tmp_path / "a.gguf", llama3_factors(*given))["rope_scaling"]
    assert scaling["rope_type"] == "llama3"
    names = ("factor", "low_freq_factor", "high_freq_factor")
    found = [scaling[n] for n in (*names, "original_max_position_embeddings")]
    np.testing.assert_allclose(found, given)


def test_rope_freqs_of_no_known_scaling_are_refused(tmp_path):
    file = tmp_path / "a.gguf"
    assert _values(file, np.ones(32))["rope_scaling"] is None
    linear = _values(file, np.full(32, 2.0))["rope_scaling"]
    assert linear == {"rope_type": "linear", "factor": 2.0}
    for factors in (np.linspace(1, 8, 32), np.linspace(0.1, 1, 32)):
        with pytest.raises(ValueError, match=r"a\.gguf: the factors of rope_freqs"):
            _values(file, factors)
    with pytest.raises(ValueError, match="both rope_freqs.weight and"):
        _values(file, np.ones(32), **{"llama.rope.scaling.type": "linear"})


def test_scaling_in_the_metadata(tmp_path):
    rope, file = "llama.rope.scaling.", tmp_path / "a.gguf"
    linear = {f"{rope}type": "linear", f"{rope}factor": 4.0}
    old = {"llama.rope.scale_linear": 4.0}
    for given in (linear, old):
        found = ModelConfig.from_hf(_values(file, **given)).rope
        assert (found.kind, found.factor) == ("linear", 4.0)
    yarn = {
        f"{rope}type": "yarn",
        f"{rope}factor": 4.0,
        f"{rope}original_context_length": 1024,
        f"{rope}yarn_beta_fast": 16.0,
        f"{rope}attn_factor": 0.5,
    }
    found = ModelConfig.from_hf(_values(file, **yarn)).rope
    assert (found.kind, found.factor, found.beta_fast) == ("yarn", 4.0, 16.0)
    assert found.original_max_position == 1024
    assert found.attention_scale == pytest.approx(0.5 * (0.1 * np.log(4) + 1))
    none = _values(file, **{f"{rope}type": "none", "llama.rope.freq_base": None})
    assert (none["rope_theta"], none["rope_scaling"]) == (10000.0, None)
    with pytest.raises(ValueError, match="scaling.type='longrope' is not supported"):
        _values(file, **{f"{rope}type": "longrope"})


def test_all_ends_of_a_turn_are_end_tokens(tmp_path):
    ids = {"tokenizer.ggml.eot_token_id": 3, "tokenizer.ggml.eom_token_id": 1}
    found = ModelConfig.from_hf(_values(tmp_path / "a.gguf", **ids))
    assert (found.eos_ids, found.bos_ids) == ((1, 3), (0,))


def test_a_sliding_window_is_refused_unless_it_is_ignored(pair):
    _, file = pair("llama", values={"llama.attention.sliding_window": 32})
    with pytest.raises(ValueError, match="sliding_window=32 is on"):
        hf.load(file)
    assert hf.load(file, ignore_sliding_window=True).config.num_layers == 3


@pytest.mark.parametrize(
    "values",
    [
        {"llama.expert_count": 0, "llama.expert_used_count": 0},
        {"llama.attention.clamp_kqv": 0.0},
        {"llama.logit_scale": 1.0},
    ],
)
def test_keys_of_other_models_that_are_off_are_ignored(pair, values):
    _, file = pair("llama", values=values)
    assert hf.load(file).config.num_layers == 3


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"split.count": 2}, "one part of a model .*llama-gguf-split --merge"),
        ({"general.type": "adapter"}, "has general.type='adapter': give"),
        ({"llama.logit_scale": 2.0}, "logit_scale may change what the model"),
        ({"llama.expert_count": 8}, "expert_count may change"),
        ({"llama.rope.dimension_count": 4}, "rope.dimension_count=4 differs from"),
        ({"llama.attention.value_length": 8}, "value_length=8 differs"),
        ({"llama.block_count": None}, "block_count is missing from the metadata"),
        ({"llama.block_count": 4}, "missing: blk.3.attn_q.weight"),
        ({"llama.block_count": 2**31}, "block_count=2147483648, but there are only"),
        ({"llama.block_count": 2}, "unknown: blk.2.attn_q.weight"),
        ({"llama.feed_forward_length": 8}, "wrong shape: blk.0.ffn_up.weight is"),
        ({"llama.attention.head_count": [4, 4, 4]}, "an array of 3.*only one int"),
        ({"tokenizer.ggml.tokens": ["a", "b"]}, "has 2 tokens, the embedding 40 rows"),
        ({"general.alignment": 0}, "truncated or damaged"),
    ],
)
def test_what_the_metadata_may_not_say(pair, values, said):
    _, file = pair("llama", values=values)
    with pytest.raises(ValueError, match=f"(?s)model.gguf.*{said}"):
        hf.load(file)


@pytest.mark.parametrize(
    ("arch", "near"),
    [("lama", "llama"), ("qwen3moe", "qwen3"), ("qwen3next", "qwen3")],
)
def test_an_unknown_architecture_names_those_that_are_known(tmp_path, arch, near):
    file = write_gguf(tmp_path / "a.gguf", arch, {}, {})
    said = (
        rf"a\.gguf: architecture '{arch}' is not supported: did you mean {near}\? use"
    )
    with pytest.raises(ValueError, match=said):
        beacon_jax.load(file)


def test_types_that_cannot_be_read_are_named(tmp_path, config_of, tensors_of):
    fields = config_of("llama") | SIZES
    tensors = gguf_tensors(fields, quantisable(tensors_of(config_of("llama"))))
    name = "blk.0.ffn_up.weight"
    tensors[name] = np.zeros((96, 2 * 40), np.uint8)  # 64 columns
    kinds = {name: TYPES.Q8_1}
    file = write_gguf(tmp_path / "a.gguf", "llama", metadata(fields), tensors, kinds)
    said = rf"(?s)a\.gguf.*{name} has type Q8_1, which cannot.*type that the gguf"
    with pytest.raises(ValueError, match=said):
        hf.load(file)
    data = file.read_bytes()
    at = data.index(name.encode()) + len(name) + 4 + 16
    assert data[at : at + 4] == int(TYPES.Q8_1).to_bytes(4, "little")
    file.write_bytes(data[:at] + (77).to_bytes(4, "little") + data[at + 4 :])
    with pytest.raises(ValueError, match=f"{name} has type 77, which is not known"):
        hf.load(file)


def test_files_that_are_no_whole_gguf_are_refused(tmp_path, pair):
    _, file = pair("llama")
    data, bad = file.read_bytes(), tmp_path / "bad.gguf"
    swapped = data[:4] + (3).to_bytes(4, "big") + data[8:]
    for content, said in (
        (b"", "is not a GGUF file: it begins with b''"),
        (b"PK\x03\x04" + data, "is not a GGUF file: it begins with b'PK"),
        (data[:12], "is truncated: it has 12 bytes"),
        (data[:300], "is truncated or damaged: its header"),
        (data[:2000], "is truncated or damaged: its header"),
        (data[:-200], r"is truncated: \S+ ends at byte \d+, the file has"),
        (data[:4] + (1).to_bytes(4, "little") + data[8:], "has GGUF version 1, this"),
        (swapped, "is big-endian"),
    ):
        bad.write_bytes(content)
        with pytest.raises(ValueError, match=f"bad.gguf {said}"):
            beacon_jax.load(bad)
    part = tmp_path / "big-00002-of-00003.gguf"
    part.write_bytes(data)
    with pytest.raises(ValueError, match=r"of-00003.gguf is one part.*--merge"):
        hf.load(part)


def run(*arguments):
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=ROOT,
        env={"PATH": "", "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )


def test_from_gguf_on_the_command_line(tmp_path, pair):
    _, file = pair("llama", TYPES.Q8_0, tokenizer=True)
    convert = "-m", "beacon_jax.convert"
    ours = tmp_path / "ours"
    flags = f"--src={file}", f"--dst={ours}", "--dtype=bfloat16", "--verify"
    result = run(*convert, "from-gguf", *flags)
    assert result.returncode == 0, result.stderr
    assert "ok: KL per token" in result.stdout
    assert json.loads((ours / "beacon_jax.json").read_text())["dtype"] == "bfloat16"
    assert (ours / "tokenizer.json").exists() and (ours / "config.json").exists()
    for command, src, said in (
        ("from-hf", file, "from-hf reads a folder; use from-gguf"),
        ("from-gguf", ours, "from-gguf reads a GGUF file"),
    ):
        result = run(*convert, command, f"--src={src}", f"--dst={tmp_path / 'no'}")
        assert result.returncode == 1
        assert f"error: --src={src}: {said}." in result.stderr


_MEASURE = """
import resource, sys
from pathlib import Path
from beacon_jax import hf
from beacon_jax.hf import conversion, hub
from beacon_jax.hf.gguf import GgufReader
import gguf
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6
before, kind, file = peak(), sys.argv[1], Path(sys.argv[2])
sizes = [t.nbytes / 1e6 for t in GgufReader(file).tensors.values()]
if kind == "load":
    made, rest = hf.load(file), sum(sizes)
else:
    conversion.from_hf(file, file.with_name("ours"), overwrite=True)
    rest = 0
print(peak() - before, max(sizes) + rest)
"""


@pytest.mark.slow
def test_memory_stays_at_the_result_the_largest_tensor_and_a_constant(
    tmp_path, config_of
):
    """380 MB of float32 in 183 tensors, the largest 66; the limit leaves 4 blocks."""
    sizes = {"hidden_size": 512, "intermediate_size": 1376, "vocab_size": 32000}
    fields = config_of("llama", **sizes, num_hidden_layers=20, head_dim=64) | {
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
    }
    model = ModelConfig.from_hf(fields)
    shapes = {key: e.hf_shape for e in hf.keys.table(model) for key in e.keys}
    named = gguf_tensors(
        fields, {k: np.zeros(shape, np.float16) for k, shape in shapes.items()}
    )
    rng = np.random.default_rng(0)
    tensors = {
        name: rng.integers(0, 100, (*x.shape[:-1], x.shape[-1] // 32 * 34), np.uint8)
        if x.ndim > 1
        else x
        for name, x in named.items()
    }
    kinds = {name: TYPES.Q8_0 for name, x in named.items() if x.ndim > 1}
    file = tmp_path / "model.gguf"
    write_gguf(file, "llama", metadata(fields), tensors, kinds)
    for kind in ("load", "convert"):
        result = run("-c", _MEASURE, kind, file)
        assert result.returncode == 0, result.stderr
        used, allowed = map(float, result.stdout.split())
        assert used < allowed + 70, kind
