"""A Qwen3 folder, read, remembered, saved and talked to."""

import dataclasses

import numpy as np
import pytest

import beacon_jax
from beacon_jax.inference import verify
from beacon_jax.inference.chat import Chat
from beacon_jax.inference.loading import load
from beacon_jax.inference.memory import Memory
from beacon_jax.inference.packs import PackError

TEXT = "In 1998 the harbour master counted 41 boats; the key is 52817. He wept. "
ROOM = {"capacity": 192}
QWEN3 = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "attention_bias": False,
    "use_sliding_window": False,
}
# As Qwen3's own template: an answer begins with its thoughts, and earlier ones are
# written without theirs.
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{{ m.content.split('</think>')[-1].lstrip('\n') }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}"
    "<think>\n\n</think>\n\n{% endif %}{% endif %}"
)


@pytest.fixture(scope="module")
def folder(make_folder):
    return make_folder(**QWEN3)


@pytest.fixture(scope="module")
def qwen3(folder):
    return load(folder)


def test_it_reads_as_numpy_does_without_beacons(qwen3, folder):
    tokens = np.asarray(qwen3.tokenizer(TEXT).input_ids[:24])
    expected = verify.numpy_logits(
        dataclasses.replace(qwen3.config, beacon=None),
        verify.open_weights(folder, None),
        tokens,
    )
    made = qwen3.complete(tokens, ratio=0, max_new_tokens=1, **ROOM)
    assert made.tokens[0] == expected[-1].argmax()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [None, "int8"])
def test_a_memory_is_saved_and_mounted_with_the_answers_it_had(qwen3, tmp_path, dtype):
    memory = qwen3.compress(TEXT, ratio=4, memory_dtype=dtype, **ROOM)
    memory.save(tmp_path / "text.beacon")
    again = Memory.load(tmp_path / "text.beacon", qwen3)
    options = {"max_new_tokens": 6, **ROOM}
    a, b = (qwen3.complete("Who?", memory=x, **options) for x in (memory, again))
    assert a.tokens.tolist() == b.tokens.tolist()
    assert memory.slots[0] == len(TEXT) // 8 * 2


def test_other_norms_are_another_base(qwen3, make_folder, folder, tmp_path):
    from safetensors.numpy import load_file, save_file

    memory = qwen3.compress(TEXT, ratio=4, **ROOM)
    memory.save(tmp_path / "text.beacon")
    other = make_folder(**QWEN3)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.self_attn.k_norm.weight"][3] += 1e-3
    save_file(tensors, other / "model.safetensors", {"format": "pt"})
    with pytest.raises(PackError, match="base"):
        Memory.load(tmp_path / "text.beacon", load(other))


@pytest.mark.slow
def test_a_conversation_leaves_earlier_thoughts_out(qwen3):
    chat = Chat(qwen3, chat_template=TEMPLATE, ratio=4, max_new_tokens=5, capacity=320)
    chat.say("Who wept?")
    chat.say("And when?")
    tokens = chat.encode(chat.messages[:-1])
    expected = qwen3.complete(tokens, ratio=4, max_new_tokens=5, capacity=320)
    assert chat.memory.entries[0] == expected.memory.entries[0]


@pytest.mark.filterwarnings("ignore:the beacons of .* are untrained")
def test_beacons_of_a_rank_take_their_anchors(make_folder):
    changes = {"rank": 2, "anchor": "last", "window": 8, "ratios": (2, 4)}
    beacon = beacon_jax.BeaconConfig(**changes)
    model = load(make_folder(beacons=False, **QWEN3), beacon=beacon)
    memory, full = (model.compress(TEXT, ratio=r, **ROOM) for r in (4, 0))
    count = int(memory.slots[0])
    values, all_values = (np.asarray(m.state.v)[0, 0] for m in (memory, full))
    anchors = all_values[3::4][:count]  # in the first layer a token's own
    np.testing.assert_allclose(values[:count], anchors, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_split_over_heads_it_computes_what_one_device_computes(make_folder):
    folder = make_folder(**QWEN3, num_key_value_heads=2, vocab_size=258)
    memories = []
    for mesh in (None, "tensor:2"):
        model = load(folder, mesh=mesh)
        norm = model.variables["params"]["layers"]["attention"]["k_norm"]["scale"]
        assert norm.sharding.is_fully_replicated
        memories.append(model.compress(TEXT, ratio=4, **ROOM))
    one, split = (np.asarray(m.state.k) for m in memories)
    np.testing.assert_allclose(split, one, rtol=0, atol=1e-4 * np.abs(one).max())
