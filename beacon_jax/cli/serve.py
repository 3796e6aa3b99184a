"""Serves a model: contexts are compressed once, and many ask them at the same time.

It speaks OpenAI's protocol (/v1/completions, /v1/chat/completions), and keeps memories
as resources (/v1/memories), which a request names by memory: "mem-...". / is a page to
try it. docs/serve.md has the whole protocol.

Example:
  beacon-jax serve --model=tiny-beacon --store=memories
"""

import contextlib
import functools
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from absl import flags

from beacon_jax import paths
from beacon_jax.cli import context
from beacon_jax.cli.ending import wait_for_python
from beacon_jax.cli.options import Group
from beacon_jax.interrupts import leave
from beacon_jax.progress import Progress

if TYPE_CHECKING:
    from beacon_jax.inference.model import Model

KEY = "BEACON_JAX_API_KEY"


def define_flags(values: flags.FlagValues = flags.FLAGS) -> None:
    context.define_model(values)
    f = Group(values, "Server")
    f.text("host", "127.0.0.1", "Address to listen at; 0.0.0.0: every one.")
    f.number("port", 8000, "0: any that is free.", lower_bound=0, upper_bound=65535)
    f.text("api_key", None, f"That clients have to send; also from ${KEY}.")
    f.text("name", None, "Of the model, as clients know it. Else its folder's.")
    f.switch("distributed", False, "One of several processes; the first answers.")
    f.text("control", None, "Address at which the others reach the first process.")
    f = Group(values, "Memories")
    f.text("store", None, "Folder of memories; without it they end with the server.")
    f.text("store_bytes", "4GiB", "RAM for memories; those on disk give way.")
    f.text("ratio", None, "Of memories that name none. Else x8, if trained.")
    f.text("method", None, context.METHODS)
    f = Group(values, "Limits")
    f.number("rows", 8, "Answers that grow at the same time.", lower_bound=1)
    f.number("slots", None, "Of a row: memory, prompt, answer. Else those trained.")
    f.number("queue", 64, "Requests that may wait, then 429.", lower_bound=1)
    f.number("max_tokens", 2**20, "Of a text, then 413.", lower_bound=1)
    f.text("max_body", "64MiB", "Of a request, then 413.")
    f.number("max_connections", 1024, "Open at a time, then 503.", lower_bound=1)
    f.real("timeout", 30.0, "Seconds to send a request, or to take an event.")


def run(o: flags.FlagValues) -> None:
    with _installed():
        from beacon_jax.serving import followers
        from beacon_jax.serving.device import Device
        from beacon_jax.serving.listen import Server, is_loopback, quiet
        from beacon_jax.serving.service import Limits, Service, check_mesh
        from beacon_jax.serving.store import Store
    from beacon_jax.inference.validate import parse_bytes
    from beacon_jax.training import processes

    quiet()
    kept, body = parse_bytes(o.store_bytes), parse_bytes(o.max_body)
    if o.store is not None:
        paths.check_folder("--store", Path(o.store))
    key = o.api_key if o.api_key is not None else os.environ.get(KEY)
    if key is not None and not key.strip():
        raise ValueError("--api_key is empty: give a key, or leave it out.")
    if o.distributed:
        processes.start()
    model = context.load_model(o, Progress())
    if model.tokenizer is None:
        raise ValueError(
            f"--model={o.model} has no tokenizer files: copy them there from the base "
            "model."
        )
    check_mesh(model)
    device = Device(model, o.rows, model.net.dtype.name)
    if o.distributed:
        if not processes.is_lead():
            return followers.follow(device)
        device = followers.lead(device, o.control)
    limits = Limits(
        rows=o.rows,
        slots=_slots(model, o.slots, o.rows),
        queue=o.queue,
        tokens=o.max_tokens,
        body=body,
        ratio=_ratio(model, o.ratio, o.method),
        method=o.method,
        key=key,
        seconds=o.timeout,
        connections=o.max_connections,
        local=key is None and is_loopback(o.host),
    )
    store = Store(model, Path(o.store) if o.store else None, kept)
    name = o.name or Path(o.model).name
    service = Service(model, name, store, limits, device)
    server = Server(service, o.host, o.port)
    if not is_loopback(o.host):
        reach = "everyone who can reach this machine can use it"
        if key is None:
            context.say(f"warning: --host={o.host} without --api_key: {reach}.")
        else:
            context.say(f"--host={o.host}: keys travel unencrypted without a proxy.")
    context.say(f"{model!r}")
    begin = time.monotonic()

    def compiled(done: int, of: int) -> None:
        seconds = f"{time.monotonic() - begin:,.0f} s"
        if done < of:
            context.say(f"compiling programs, size {done + 1} of {of}: {seconds}")
        else:
            context.say(f"ready after {seconds}: open {server.address}")

    service.on_compiled = compiled
    context.say(f"{limits.rows} rows of {limits.slots:,} slots")
    wait_for_python()  # Ctrl-C lets answers end, however long that takes
    server.run()
    if isinstance(device, followers.Leader):
        device.end()
    if service.failed is not None:
        raise service.failed
    if service.running:  # a thread inside of XLA crashes when Python ends below it
        leave(0)


@contextlib.contextmanager
def _installed() -> Iterator[None]:
    """Names the extra where a library of the server is missing."""
    try:
        yield
    except ImportError as error:
        raise ImportError(
            f"serve needs {error.name}: pip install 'beacon_jax[serve]'."
        ) from error


def _slots(model: "Model", asked: int | None, rows: int) -> int:
    """Returns the slots of a row; ValueError for more than the device has room for."""
    from beacon_jax.inference import room

    least = 4 * model.window
    free = room.free_slots(model, 2 * rows, model.net.dtype.name)
    slots = asked or model.config.trained_positions
    if slots < least:
        raise ValueError(
            f"--slots={slots} is too few: four windows are {least}, give as many."
        )
    if free is None or slots <= free:
        return slots
    if asked is None and free >= least:
        context.say(f"--slots={free}: more do not fit beside the weights.")
        return free
    raise ValueError(
        f"--slots={slots} with --rows={rows} has no room: at most {free:,} fit; give "
        "fewer of either."
    )


def _ratio(
    model: "Model", asked: str | None, method: str | None
) -> int | str | list[int] | None:
    """Returns the ratio of memories that name none."""
    from beacon_jax.inference.validate_ratio import check_ratios

    given = context.parse_ratio(asked)
    if given is not None:
        if isinstance(given, list) and len(given) == 1:
            given = given[0]
        if method in (None, "beacon"):
            check_ratios(given, model.config)
        return given
    beacon = model.config.beacon
    if beacon is None:
        return 8 if method else None
    return max((r for r in beacon.ratios if 0 < r <= 8), default=max(beacon.ratios))


main = functools.partial(context.main, run)
