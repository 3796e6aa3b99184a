"""What `generate` does with its prompts: a batch of answers, or a conversation."""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl import flags

from beacon_jax.cli import context

if TYPE_CHECKING:
    from beacon_jax.inference.chat import Chat
    from beacon_jax.inference.model import Generation, Model

COMMANDS = "/undo, /save FILE, /memory and /exit"


def read_prompts(o: flags.FlagValues) -> list[str]:
    """The prompts of the flags, none for a conversation.

    Raises:
      ValueError: flags that exclude each other, no prompt, or a missing file.
    """
    stdin = [n for n in (o.context or []) if n == "-"]
    if o.chat:
        for name in ("prompt", "prompt_file", "json"):
            if getattr(o, name):
                raise ValueError(
                    f"--{name}={getattr(o, name)} together with --chat, which reads "
                    "messages from stdin and answers in text: leave one of them out."
                )
        if stdin:
            raise ValueError(
                "--context=- reads stdin, which --chat takes messages from: name a "
                "file."
            )
        return []
    for name in ("system", "chat_template"):
        if getattr(o, name):
            raise ValueError(f"--{name}={getattr(o, name)} is of --chat: add that.")
    if o.prompt_file and o.prompt:
        raise ValueError(
            f"--prompt_file={o.prompt_file} together with --prompt: give one of them."
        )
    if o.prompt_file == "-" and stdin:
        raise ValueError(
            "--context=- and --prompt_file=- both read stdin: name a file for one."
        )
    if o.prompt_file:
        text = context.read_text("prompt_file", o.prompt_file)
        # An editor's last line break is no part of the prompt.
        return [text.removesuffix("\n").removesuffix("\r")]
    if not o.prompt:
        raise ValueError("--prompt is missing: give it, --prompt_file or --chat.")
    return o.prompt


def read_template(o: flags.FlagValues) -> str | None:
    """The text of --chat_template."""
    if o.chat_template is None:
        return None
    if o.chat_template == "-":
        raise ValueError(
            "--chat_template=- reads stdin, which --chat does: name a file."
        )
    return context.read_text("chat_template", o.chat_template)


def sampling(o: flags.FlagValues) -> dict[str, Any]:
    """Options of `Model.complete` on drawing tokens and on where to stop."""
    names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")
    return {name: getattr(o, name) for name in names} | {"stop": o.stop or ()}


def answer(
    model: "Model",
    read: context.Context,
    prompts: list[str],
    options: dict[str, Any],
    *,
    as_json: bool = False,
) -> None:
    """Continues every prompt, in one batch; writes the texts or JSON to stdout.

    A single text is shown while it comes, several in order when all are done.
    """
    made = model.complete(
        prompts if len(prompts) > 1 else prompts[0],
        memory=read.memory,
        on_text=_show if len(prompts) == 1 and not as_json else None,
        on_progress=context.Progress(),
        **read.ratio,
        **options,
    )
    several = made if isinstance(made, list) else [made]
    for prompt, each in zip(prompts, several, strict=True):
        if as_json:
            line = _object(model, read, prompt, each)
            print(json.dumps(line, ensure_ascii=False), flush=True)
        else:
            print(each.text if len(prompts) > 1 else "", flush=True)
    _account(read, several)


def _show(text: str) -> None:
    print(text, end="", flush=True)


def _object(
    model: "Model", read: context.Context, prompt: str, made: "Generation"
) -> dict[str, Any]:
    """One line of --json; seconds are those of the whole batch, with compilation."""
    return {
        "prompt": prompt,
        "text": made.text,
        "tokens": made.tokens.tolist(),
        "finish": made.finish,
        "note": "; ".join([*read.notes, *([made.note] if made.note else [])]),
        "prompt_tokens": made.prompt_tokens,
        "seconds": {
            "context": round(read.seconds, 3),
            "prompt": round(made.prefill_seconds, 3),
            "decode": round(made.decode_seconds, 3),
        },
        "memory": context.figures(model, made.batch, made.row),
    }


def _account(read: context.Context, made: list["Generation"]) -> None:
    for note in dict.fromkeys(each.note for each in made if each.note):
        context.say(note)
    tokens = read.tokens + sum(each.prompt_tokens for each in made)
    new = sum(len(each.tokens) for each in made)
    seconds = read.seconds + made[0].prefill_seconds
    context.say(
        f"{made[0].batch.describe()}\nwith compilation: "
        f"prefill {tokens} tokens, {tokens / seconds:.1f} tokens/s; "
        f"decode {new} tokens, {new / made[0].decode_seconds:.1f} tokens/s"
    )


def talk(
    model: "Model",
    read: context.Context,
    system: str | None,
    template: str | None,
    options: dict[str, Any],
) -> None:
    """A conversation on stdin and stdout, until /exit or the end of stdin."""
    from beacon_jax.inference.chat import Chat

    chat = Chat(
        model, read.memory, system, chat_template=template, **read.ratio, **options
    )
    context.say(f"commands: {COMMANDS} (or Ctrl-D)")
    while (line := _ask()) is not None:
        if not line.strip():
            continue
        try:
            if line.startswith("/"):
                if not _obey(chat, line):
                    return
            else:
                made = chat.say(line, on_text=_show)
                print(flush=True)
                context.say(context.summary(model, made.memory))
        except KeyboardInterrupt:
            print(flush=True)
            context.say("stopped: that turn is not part of the conversation")
        except (ValueError, OSError) as error:
            context.say(f"error: {context.in_flags(error)}")


def _obey(chat: "Chat", line: str) -> bool:
    """Runs a command; False ends the conversation."""
    name, _, rest = line.strip().partition(" ")
    rest = rest.strip()
    if name == "/exit":
        return False
    if name == "/undo":
        chat.undo()
        context.say(f"{len(chat.messages)} messages are left")
    elif name == "/save":
        if not rest:
            raise ValueError("/save needs the name of a file: /save FILE.")
        if Path(rest).exists():
            raise ValueError(f"/save {rest}: the file exists, name another.")
        if chat.memory is None:
            raise ValueError("/save: nothing has been said yet.")
        chat.memory.save(rest)
        context.say(f"wrote {rest}")
    elif name == "/memory":
        context.say(chat.memory.describe() if chat.memory else "no memory yet")
    else:
        raise ValueError(f"unknown command {name}: there are {COMMANDS}.")
    return True


def _ask() -> str | None:
    """The next line of stdin; None at its end."""
    try:
        if sys.stdin.isatty() and sys.stdout.isatty():
            import readline  # noqa: F401 - editing and history for `input`

            return input("> ")
        print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        return line.rstrip("\r\n") if line else None
    except (EOFError, KeyboardInterrupt):
        return None
