"""Generates text after a context of any length, compressed by a ratio.

The context is read once; every --prompt is asked against it, all in one batch.
--save_memory writes the memory of the context, without prompts and answers. stdout has
the texts alone, or with --json one object per prompt.

Example:
  beacon-jax generate --model=tiny-beacon --context=book.txt --ratio=8 \\
    --prompt="The pass key is"
"""

import functools

from absl import flags

from beacon_jax.cli import answers, context
from beacon_jax.cli.options import Group
from beacon_jax.progress import Progress


def define_flags(values: flags.FlagValues = flags.FLAGS) -> None:
    context.define_flags(values)
    f = Group(values, "Text")
    f.texts("prompt", None, "Text to continue; repeated: several, in one batch.")
    f.text("prompt_file", None, "Its text is the prompt; - is stdin.")
    f.switch("instruct", False, "Ask --prompt in the tokenizer's chat template.")
    f.switch("chat", False, "Talk to the model, in the tokenizer's chat template.")
    f.text("system", None, "--chat: the system message.")
    f.text("chat_template", None, "--chat: jinja file in place of the tokenizer's.")
    f = Group(values, "Compression")
    f.text("load_memory", None, "Beacon pack that comes before --context.")
    f = Group(values, "Sampling")
    f.number("max_new_tokens", None, "At most; 64 if not given, 512 with --chat.")
    f.real("temperature", 0.0, "0: greedy.")
    f.number("top_k", 0, "Draw from the k most likely tokens; 0: all.")
    f.real("top_p", 1.0, "Draw from the top tokens that reach p; 1: all.")
    f.real("min_p", 0.0, "Draw from tokens at least p times as likely as the top one.")
    f.real("repetition_penalty", 1.0, "Of tokens that occurred; 1: none.")
    f.texts("stop", None, "Text that ends an answer; may be repeated.")
    f = Group(values, "Output")
    f.text("save_memory", None, "Beacon pack to write: the memory of the context.")
    f.switch("json", False, "One JSON object per prompt, with figures.")


def run(o: flags.FlagValues) -> None:
    prompts = answers.read_prompts(o)
    texts = [*(o.context or []), *([o.prompt_file] if o.prompt_file else [])]
    context.check_new("save_memory", o.save_memory, overwrite=o.overwrite, texts=texts)
    if o.save_memory and not (o.context or o.load_memory):
        raise ValueError(
            f"--save_memory={o.save_memory} writes the memory of a context: give "
            "--context or --load_memory."
        )
    new = o.max_new_tokens
    new = (512 if o.chat else 64) if new is None else new
    sampling = answers.sampling(o) | {"max_new_tokens": new}
    context.check_options(o, "load_memory", max(len(prompts), 1), **sampling)
    text, template = context.read_context(o), answers.read_template(o)
    progress = Progress()
    model = context.load_model(o, progress)
    memory = context.load_memory("load_memory", o.load_memory, model)
    rows = answers.written(model, prompts, instruct=o.instruct)
    reserve = max(map(len, rows), default=0) + new
    read = context.read(model, o, text, memory, progress, reserve)
    if o.save_memory and read.memory is not None:
        read.memory.save(o.save_memory, overwrite=o.overwrite)
        context.say(f"wrote {o.save_memory}")
    if o.chat:
        answers.talk(model, read, o, template, sampling, progress)
    else:
        options = sampling | {"instruct": o.instruct}
        answers.answer(model, read, prompts, options, progress, as_json=o.json)


main = functools.partial(context.main, run)
