"""Generates text after a context of any length, compressed by a ratio.

python -m beacon_jax.generate --model=DIR --context=FILE|- --prompt="..." --ratio=8 \
    [--save_memory=FILE.beacon | --load_memory=FILE.beacon] [--json] \
    [--max_new_tokens=64] [--temperature=0.7 --top_p=0.9 --stop="\\n" --seed=0]
python -m beacon_jax.generate --model=DIR --context=FILE --chat

The context is read once; every --prompt is asked against it, all in one batch.
--save_memory writes the memory of the context, without prompts and answers. stdout has
the texts alone, or with --json one object per prompt.
"""

import functools

from absl import flags

from beacon_jax.cli import answers, context


def define_flags(values: flags.FlagValues = flags.FLAGS) -> None:
    context.define_flags(values)
    text, many, number, real, switch = (
        functools.partial(getattr(flags, f"DEFINE_{kind}"), flag_values=values)
        for kind in ("string", "multi_string", "integer", "float", "bool")
    )
    many("prompt", None, "Text to continue; repeated: several, in one batch.")
    text("prompt_file", None, "Its text is the prompt; - is stdin.")
    text("load_memory", None, "Beacon pack that comes before --context.")
    text("save_memory", None, "Beacon pack to write: the memory of the context.")
    switch("json", False, "One JSON object per prompt, with figures.")
    switch("chat", False, "Talk to the model, in the tokenizer's chat template.")
    text("system", None, "--chat: the system message.")
    text("chat_template", None, "--chat: jinja file in place of the tokenizer's.")
    number("max_new_tokens", None, "At most; 64 if not given, 512 with --chat.")
    real("temperature", 0.0, "0: greedy.")
    number("top_k", 0, "Draw from the k most likely tokens; 0: all.")
    real("top_p", 1.0, "Draw from the top tokens that reach p; 1: all.")
    real("min_p", 0.0, "Draw from tokens at least p times as likely as the top one.")
    real("repetition_penalty", 1.0, "Of tokens that occurred; 1: none.")
    many("stop", None, "Text that ends an answer; may be repeated.")


def run(o: flags.FlagValues) -> None:
    prompts = answers.read_prompts(o)
    context.check_new("save_memory", o.save_memory, overwrite=o.overwrite)
    if o.save_memory and not (o.context or o.load_memory):
        raise ValueError(
            f"--save_memory={o.save_memory} writes the memory of a context: give "
            "--context or --load_memory."
        )
    context.parse_ratio(o.ratio)
    text, template = context.read_context(o), answers.read_template(o)
    model = context.load_model(o)
    memory = context.load_memory("load_memory", o.load_memory, model)
    new = o.max_new_tokens
    new = (512 if o.chat else 64) if new is None else new
    sizes = [len(model.encode(p, "prompt", first=False)) for p in prompts]
    read = context.read(model, o, text, memory, max(sizes, default=0) + new)
    if o.save_memory and read.memory is not None:
        read.memory.save(o.save_memory)
        context.say(f"wrote {o.save_memory}")
    sampling = answers.sampling(o) | {"max_new_tokens": new}
    if o.chat:
        answers.talk(model, read, o.system, template, sampling)
    else:
        answers.answer(model, read, prompts, sampling, as_json=o.json)


main = functools.partial(context.main, run)
