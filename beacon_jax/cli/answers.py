"""Answers the prompts of `generate`: by a batch of answers, or in a conversation."""

import io
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl import flags

from beacon_jax.cli import context, ending
from beacon_jax.paths import FULL
from beacon_jax.progress import Progress, Stage

if TYPE_CHECKING:
    from beacon_jax.inference.chat import Chat
    from beacon_jax.inference.model import Generation, Model

COMMANDS = "/undo, /save FILE, /memory and /exit"


def read_prompts(o: flags.FlagValues) -> list[str]:
    """Reads the prompts of the flags; there are none for a conversation.

    Raises:
      ValueError: flags that exclude each other, no prompt, or a missing file.
    """
    stdin = [n for n in (o.context or []) if n == "-"]
    if o.chat:
        for name in ("prompt", "prompt_file", "json", "instruct"):
            if getattr(o, name):
                raise ValueError(
                    f"--{name}={getattr(o, name)} together with --chat, which reads "
                    "messages from stdin and answers in text: leave one of them out."
                )
        if sys.stdin is None:
            raise ValueError("--chat reads messages from stdin, which is closed.")
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
        text = context.read_text("prompt_file", o.prompt_file, o.encoding)
        # An editor's last line break is no part of the prompt.
        return [text.removesuffix("\n").removesuffix("\r")]
    if o.prompt and not all(o.prompt):
        raise ValueError("--prompt= is empty: give text to continue.")
    if not o.prompt:
        raise ValueError("--prompt is missing: give it, --prompt_file or --chat.")
    return o.prompt


def read_template(o: flags.FlagValues) -> str | None:
    """Reads the text of --chat_template."""
    if o.chat_template is None:
        return None
    if o.chat_template == "-":
        raise ValueError(
            "--chat_template=- reads stdin, which --chat does: name a file."
        )
    return context.read_text("chat_template", o.chat_template, o.encoding)


def sampling(o: flags.FlagValues) -> dict[str, Any]:
    """Returns options of `Model.complete` on drawing tokens and on where to stop."""
    names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")
    return {name: getattr(o, name) for name in names} | {"stop": o.stop or ()}


def written(
    model: "Model", prompts: Sequence[str], *, instruct: bool
) -> list[Sequence[int]]:
    """Returns the token ids of each prompt, in the chat template if `instruct`.

    Raises:
      ValueError: `instruct`, and the tokenizer has no template.
    """
    if not instruct:
        return [model.encode(p, "prompt", first=False).tolist() for p in prompts]
    from beacon_jax.inference.template import encode_question

    return [encode_question(model, p, first=False).tolist() for p in prompts]


def answer(
    model: "Model",
    read: context.Context,
    prompts: list[str],
    options: dict[str, Any],
    progress: Progress,
    *,
    as_json: bool = False,
) -> None:
    """Continues every prompt, in one batch; writes the texts or JSON to stdout.

    A single text is shown while it comes, several in order when all are done.
    """
    with progress.stage("reading", "tokens") as stage:
        made = model.complete(
            prompts if len(prompts) > 1 else prompts[0],
            memory=read.memory,
            on_text=_shown(stage) if len(prompts) == 1 and not as_json else None,
            on_tokens=stage.add,
            on_progress=_read(stage),
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
    _account(model, read, several)


def _shown(stage: Stage) -> Callable[[str], None]:
    """Makes a callback that shows a text while it comes."""

    def show(text: str) -> None:
        print(text, end="", flush=True)
        stage.alive()

    return show


def _read(stage: Stage) -> Callable[[int, int], None]:
    """Makes a callback that reports how far the prompts are read.

    When all are read, it says that the answers come.
    """

    def report(fed: int, total: int) -> None:
        stage(fed, total)
        if fed >= total:
            stage.becomes("answering")

    return report


def _object(
    model: "Model", read: context.Context, prompt: str, made: "Generation"
) -> dict[str, Any]:
    """Makes one line of --json; seconds are those of the whole batch."""
    timing, rate = made.timing, made.timing.tokens_per_second
    return {
        "prompt": prompt,
        "text": made.text,
        "tokens": made.tokens.tolist(),
        "finish": made.finish,
        "note": "; ".join([*read.notes, *([made.note] if made.note else [])]),
        "context_tokens": read.tokens,
        "prompt_tokens": made.prompt_tokens,
        "answer_tokens": len(made.tokens),
        "seconds": {
            "compile": round(read.compiled + timing.compile, 3),
            "context": round(read.seconds, 3),
            "first_token": round(timing.first_token, 3),
            "later_tokens": round(timing.later, 3),
        },
        "tokens_per_second": rate and round(rate, 2),
        "memory": context.figures(model, made.batch, made.row),
    }


def _account(
    model: "Model", read: context.Context, made: Sequence["Generation"]
) -> None:
    """Writes to stderr: notes, counts of tokens, what the memory holds, and times."""
    for note in dict.fromkeys(each.note for each in made if each.note):
        context.say(note)
    total = lambda name, counts: f"{sum(counts):,} {name} tokens"
    parts = [total("context", [read.tokens])] if read.tokens else []
    parts.append(total("prompt", [each.prompt_tokens for each in made]))
    parts.append(total("answer", [len(each.tokens) for each in made]))
    rows = f" in {len(made)} rows" if len(made) > 1 else ""
    context.say(f"{', '.join(parts)}{rows}")
    context.say(
        context.summary(model, made[0].batch)
        if len(made) == 1
        else made[0].batch.describe()
    )
    timing = made[0].timing
    times = [f"compiled in {read.compiled + timing.compile:,.1f} s"]
    if read.tokens:
        rate = read.tokens / max(read.seconds, 1e-9)
        times.append(f"context {read.seconds:,.2f} s ({rate:,.0f} tokens/s)")
    times.append(f"first token {timing.first_token:,.2f} s")
    if timing.tokens_per_second:
        times.append(f"then {timing.tokens_per_second:,.1f} tokens/s")
    context.say("; ".join(times))


def talk(
    model: "Model",
    read: context.Context,
    o: flags.FlagValues,
    template: str | None,
    options: dict[str, Any],
    progress: Progress,
) -> None:
    """Holds a conversation on stdin and stdout, until /exit or the end of stdin."""
    from beacon_jax.inference.chat import Chat

    chat = Chat(
        model, read.memory, o.system, chat_template=template, **read.ratio, **options
    )
    ending.wait_for_python()  # Ctrl-C ends a turn, not the conversation
    if isinstance(sys.stdin, io.TextIOWrapper):
        # Bytes that are no UTF-8 are an error of their line: `Chat.say` refuses it.
        sys.stdin.reconfigure(encoding="utf-8", errors="surrogateescape")
    context.say(f"commands: {COMMANDS} (or Ctrl-D)")
    while (line := _ask()) is not None:
        if not line.strip():
            continue
        try:
            if line.startswith("/"):
                if not _obey(chat, line):
                    return
            else:
                with progress.stage("answering") as stage:
                    made = chat.say(line, on_text=_shown(stage))
                print(flush=True)
                for text in filter(None, [made.note]):
                    context.say(text)
                context.say(context.summary(model, made.memory))
        except KeyboardInterrupt:
            print(flush=True)
            context.say("stopped: that turn is not part of the conversation")
        except BrokenPipeError:
            raise  # nobody reads the answers any more
        except (ValueError, OSError) as error:
            if getattr(error, "errno", None) in FULL:
                raise  # of stdout: files that are written are named
            context.say(f"error: {ending.in_flags(error, o)}")


def _obey(chat: "Chat", line: str) -> bool:
    """Runs a command of the user; returns False to end the conversation."""
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
    """Reads the next line of stdin; None at its end."""
    try:
        if sys.stdin.isatty() and sys.stdout.isatty():
            import readline  # noqa: F401 - editing and history for `input`

            return input("> ")
        context.say("> ", end="")
        line = sys.stdin.readline()
        return line.rstrip("\r\n") if line else None
    except (EOFError, KeyboardInterrupt):
        return None
