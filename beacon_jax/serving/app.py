"""The routes: models, memories, completions, conversations, health and the page."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from sse_starlette.sse import EventSourceResponse
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import Receive, Scope, Send

from beacon_jax.decoding import decode
from beacon_jax.inference.validate import parse_bytes
from beacon_jax.serving import prompts
from beacon_jax.serving.answers import JSON, Answering, Writer, event, shown
from beacon_jax.serving.errors import Refused, body, logged, response
from beacon_jax.serving.guard import Guard, too_large
from beacon_jax.serving.protocol import (
    ChatRequest,
    CompletionRequest,
    ForkRequest,
    MemoryRequest,
    parsed,
)
from beacon_jax.serving.reading import Job, Source, methods, planned_slots
from beacon_jax.serving.rows import Ended
from beacon_jax.serving.service import Service

PAGE = Path(__file__).with_name("page")
OFTEN = 0.1  # seconds between two events of progress
SMALL = 2**16  # bytes of a body that is read at once: in less than a millisecond


def make_app(service: Service) -> Starlette:
    """Makes the application of a service."""
    routes = Routes(service)
    get = lambda path, handler: Route(path, handler, methods=["GET"])
    post = lambda path, handler: Route(path, handler, methods=["POST"])
    app = Starlette(
        routes=[
            get("/", routes.page),
            Mount("/page", StaticFiles(directory=PAGE)),
            get("/health", routes.health),
            get("/ready", routes.is_ready),
            get("/metrics", routes.metrics_text),
            get("/v1/models", routes.models),
            get("/v1/models/{name:path}", routes.model),
            post("/v1/completions", routes.complete),
            post("/v1/chat/completions", routes.chat),
            get("/v1/memories", routes.memories),
            post("/v1/memories", routes.make_memory),
            get("/v1/memories/{name}", routes.memory),
            Route("/v1/memories/{name}", routes.delete, methods=["DELETE"]),
            post("/v1/memories/{name}/append", routes.append),
            post("/v1/memories/{name}/fork", routes.fork),
        ],
        # Other errors become answers in Guard, which is around all of it.
        middleware=[Middleware(Guard, service=service)],
        exception_handlers={HTTPException: _http_error},
    )
    return app


class Routes:
    """The handlers; every error of theirs becomes an answer (`errors`)."""

    def __init__(self, service: Service):
        self.service, self.metrics = service, service.metrics
        self.metrics.watch(service)

    async def _bytes(self, request: Request) -> bytes:
        """Reads the body, as much and as long as is allowed."""
        parts, size = [], 0
        try:
            async with asyncio.timeout(self.service.limits.seconds):
                async for part in request.stream():
                    size += len(part)
                    if size > self.service.limits.body:
                        raise too_large(self.service)
                    parts.append(part)
        except TimeoutError:
            seconds = self.service.limits.seconds
            raise Refused(
                408,
                f"the body did not come within {seconds:g} s: send it faster, or in "
                "parts (append).",
                "timeout",
            ) from None
        except ClientDisconnect:
            raise gone() from None
        return b"".join(parts)

    async def _json(self, request: Request) -> Any:
        return await _worked(_parse, await self._bytes(request))

    async def _asked[Kind: BaseModel](self, request: Request, kind: type[Kind]) -> Kind:
        data = await self._bytes(request)
        return await _worked(lambda data: parsed(kind, _parse(data)), data)

    # --- health ------------------------------------------------------------------

    async def page(self, request: Request) -> Response:
        return FileResponse(PAGE / "index.html")

    async def health(self, request: Request) -> Response:
        if (error := self.service.failed) is not None:
            return JSONResponse({"status": "failed", "error": str(error)}, 500)
        return JSONResponse({"status": "ok"})

    async def is_ready(self, request: Request) -> Response:
        service = self.service
        if service.ready.is_set():
            return JSONResponse({"status": "ready"})
        told = {"status": "compiling", "done": service.compiled, "of": service.sizes}
        return JSONResponse(told, 503)

    async def metrics_text(self, request: Request) -> Response:
        return Response(self.metrics.text(), media_type="text/plain; version=0.0.4")

    # --- models ------------------------------------------------------------------

    async def models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._model()]})

    async def model(self, request: Request) -> Response:
        if request.path_params["name"] != self.service.name:
            raise Refused(
                404,
                f"the model {request.path_params['name'][:80]!r} is not served here: "
                f"use {self.service.name!r}.",
                "model_not_found",
            )
        return JSONResponse(self._model())

    def _model(self) -> JSON:
        service = self.service
        model, beacon = service.model, service.model.config.beacon
        return {
            "id": service.name,
            "object": "model",
            "created": service.created,
            "owned_by": "beacon_jax",
            "window": model.window,
            "ratios": list(beacon.ratios) if beacon else [],
            "methods": methods(model),
            "max_tokens": service.limits.tokens,
            "max_slots": service.limits.slots,
            "chat": bool(getattr(model.tokenizer, "chat_template", None)),
        }

    # --- answers -----------------------------------------------------------------

    async def complete(self, request: Request) -> Response:
        asked = await self._asked(request, CompletionRequest)
        found = await run_in_threadpool(prompts.completion_asks, self.service, asked)
        writer = Writer(self.service, found, chat=False, top=asked.logprobs or 0)
        return await self._answer(request, asked, writer)

    async def chat(self, request: Request) -> Response:
        asked = await self._asked(request, ChatRequest)
        found = [await run_in_threadpool(prompts.chat_ask, self.service, asked)]
        top = asked.top_logprobs or 0
        writer = Writer(self.service, found, chat=True, top=top)
        return await self._answer(request, asked, writer)

    async def _answer(self, request: Request, asked: Any, writer: Writer) -> Response:
        if asked.store and len(writer.prompted) * (asked.n or 1) > 1:
            raise ValueError("store=true keeps one answer: ask for one, with n=1.")
        answering = Answering(self.service, writer.prompted)
        if asked.stream:
            usage = bool(asked.stream_options and asked.stream_options.include_usage)
            return Events(self._chunks(answering, writer, usage), answering.close)
        try:
            whole, ends = await _until_gone(request, writer.whole(answering))
        finally:
            answering.close()
        if ends and ends[0].memory is not None:
            text = _text_of(whole)
            whole["memory"] = await run_in_threadpool(self._kept, writer, ends[0], text)
        return JSONResponse(whole)

    async def _chunks(
        self, answering: Answering, writer: Writer, usage: bool
    ) -> AsyncIterator[JSON]:
        texts: list[str] = []
        try:
            for chunk in writer.opening():
                yield event(chunk)
            async for number, happened in answering:
                writer.note(happened)
                texts.append(getattr(happened, "text", ""))
                if isinstance(happened, Ended) and happened.memory is not None:
                    writer.more["memory"] = await run_in_threadpool(
                        self._kept, writer, happened, "".join(texts)
                    )
                chunk = await writer.chunk_of(number, happened)
                if chunk is not None:
                    yield event(chunk)
            if last := writer.closing(answering.tickets, usage=usage):
                yield event(last)
            yield event("[DONE]")
        except Exception as error:
            yield event(logged(error))

    def _kept(self, writer: Writer, end: Ended, text: str) -> JSON:
        """Puts what an answer left into the store; returns what is told of it."""
        (prompted,) = writer.prompted
        assert end.memory is not None
        messages = prompted.messages
        base = prompted.base if messages is not None else None
        if messages is not None:
            messages = [*messages, {"role": "assistant", "content": text}]
        tokens = end.memory.rows[0].tokens
        if tokens is None:
            raise ValueError(
                "store=true needs the tokens of the memory, which were not kept: make "
                "it here again."
            )
        settings = {"ratio": prompted.ask.ratio}
        source = Source(tokens, settings, prompted.parent, messages, base)
        return shown(self.service.reading.keep(end.memory, source), whole=False)

    # --- memories ----------------------------------------------------------------

    async def memories(self, request: Request) -> Response:
        def listed() -> list[JSON]:
            making = [_making(job) for job in self.service.reading.jobs()]
            return making + [shown(x, whole=False) for x in self.service.store.all()]

        data = await run_in_threadpool(listed)
        return JSONResponse({"object": "list", "data": data})

    async def memory(self, request: Request) -> Response:
        name = request.path_params["name"]
        if job := self.service.reading.find(name):
            return JSONResponse(_making(job))
        if (error := self.service.reading.failure(name)) is not None:
            told = {"id": name, "object": "memory", "status": "failed"}
            return JSONResponse(told | body(error)[1])
        about = await run_in_threadpool(self.service.store.about, name)
        return JSONResponse(shown(about))

    async def delete(self, request: Request) -> Response:
        name = request.path_params["name"]
        if job := self.service.reading.find(name):
            self.service.reading.cancel(job.id)
        else:
            await run_in_threadpool(self.service.store.delete, name)
        return JSONResponse({"id": name, "object": "memory", "deleted": True})

    async def make_memory(self, request: Request) -> Response:
        fields = await self._fields(request)
        asked = await run_in_threadpool(parsed, MemoryRequest, fields)
        return await self._read(request, asked, None)

    async def append(self, request: Request) -> Response:
        fields = await self._fields(request)
        asked = await run_in_threadpool(parsed, MemoryRequest, fields)
        return await self._read(request, asked, request.path_params["name"])

    async def fork(self, request: Request) -> Response:
        data = await self._bytes(request)
        given = await run_in_threadpool(_parse, data) if data else {}
        asked = parsed(ForkRequest, given)
        name = request.path_params["name"]
        about = await run_in_threadpool(self.service.reading.fork, name, asked.name)
        return JSONResponse(shown(about), 201)

    async def _read(
        self, request: Request, asked: MemoryRequest, parent: str | None
    ) -> Response:
        service = self.service
        source = await run_in_threadpool(prompts.source, service, asked, parent)
        alone = asked.background
        job = await run_in_threadpool(service.reading.submit, source, alone=alone)
        there = job.about is not None
        if asked.background:
            service.reading.leave(job)
            told = shown(job.about) if job.about else _making(job)
            return JSONResponse(told, 200 if there else 202)
        if asked.stream:
            leave = lambda: service.reading.leave(job)
            return Events(self._progress(job), leave)
        try:
            await _until_gone(request, _ended(job))
        finally:
            service.reading.leave(job)
        if job.error is not None:
            raise job.error
        assert job.about is not None
        return JSONResponse(shown(job.about), 200 if there else 201)

    async def _progress(self, job: Job) -> AsyncIterator[JSON]:
        async for _ in _changes(job):
            told = _making(job)
            slots = planned_slots(
                self.service.model, job.tokens, _ratio(job.source.settings)
            )
            yield event(
                {
                    "object": "memory.progress",
                    "id": job.id,
                    "window": self.service.model.window,
                    "slots": slots,
                }
                | told["progress"]
            )
        if job.error is not None:
            yield event(logged(job.error))
            return
        assert job.about is not None
        yield event(shown(job.about))
        yield event("[DONE]")

    async def _fields(self, request: Request) -> Any:
        """Reads JSON, or a form with a text file."""
        kind = request.headers.get("content-type", "")
        if not kind.startswith("multipart/form-data"):
            return await self._json(request)
        data = await self._bytes(request)

        async def receive() -> dict[str, Any]:
            return {"type": "http.request", "body": data, "more_body": False}

        again = Request(request.scope, receive)
        try:
            form = await again.form(max_files=1, max_fields=20, max_part_size=2**20)
        except HTTPException as error:
            raise ValueError(f"the form cannot be read: {error.detail}") from None
        async with contextlib.aclosing(_Closing(form)):
            fields = {k: _field(k, v) for k, v in form.items() if isinstance(v, str)}
            files = [v for v in form.values() if not isinstance(v, str)]
            if len(files) != 1 or "text" in fields:
                raise ValueError("the form needs one file, in the field `file`.")
            content = await files[0].read()
            name = (files[0].filename or "file")[-200:]
        try:
            text = await run_in_threadpool(decode, content, f"file={name}", None)
        except ValueError as error:
            raise Refused(415, str(error), "no_text") from None
        return {"name": name} | fields | {"text": text}


class _Closing:
    """Closes a form's files at the end of a block."""

    def __init__(self, form: Any):
        self._form = form

    async def aclose(self) -> None:
        await self._form.close()


def _field(name: str, value: str) -> Any:
    """Reads a field of a form as JSON would have it."""
    if name in ("ratio", "max_slots", "max_bytes", "spans", "stream", "background"):
        with contextlib.suppress(ValueError, RecursionError):
            return json.loads(value, parse_constant=_no_number)
        if name == "max_bytes":
            return parse_bytes(value)
    return value


async def _worked[Result](call: Callable[[bytes], Result], data: bytes) -> Result:
    """Calls, in a thread if it takes long."""
    if len(data) < SMALL:
        return call(data)
    return await run_in_threadpool(call, data)


def _parse(data: bytes) -> Any:
    try:
        found = json.loads(data, parse_constant=_no_number)
        if b"\\" in data:  # the only way that half of a character can come in
            json.dumps(found, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise ValueError(
            "the body has half of a character, \\ud800 to \\udfff alone: send it as "
            "UTF-8."
        ) from None
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"the body is no JSON: {str(error)[:100]}. Send an object."
        ) from None
    return found


def _no_number(name: str) -> Any:
    raise ValueError(f"{name} is no number of JSON: give a finite one")


def _making(job: Job) -> JSON:
    """Returns what is told of a memory in the making."""
    return {
        "id": job.id,
        "object": "memory",
        "status": "compressing",
        "name": job.source.name,
        "settings": job.source.settings,
        "parent": job.source.parent,
        "progress": {"tokens": job.tokens, "total": job.total},
    }


def _ratio(settings: JSON) -> float:
    ratio = settings.get("ratio")
    return ratio if isinstance(ratio, int) and ratio > 0 else 1


async def _changes(job: Job) -> AsyncIterator[None]:
    """Yields whenever a job has changed, not too often, until it has ended."""
    loop, changed = asyncio.get_running_loop(), asyncio.Event()
    listener = lambda: loop.call_soon_threadsafe(changed.set)
    job.listeners.append(listener)
    try:
        while not job.done:
            yield
            await changed.wait()
            changed.clear()
            if not job.done:
                await asyncio.sleep(OFTEN)
        yield
    finally:
        job.listeners.remove(listener)


async def _ended(job: Job) -> None:
    async for _ in _changes(job):
        pass


async def _until_gone[T](request: Request, work: Awaitable[T]) -> T:
    """Awaits work; cancels it when the client goes.

    Raises:
      Refused: the client has gone, and will not read this.
    """

    async def left() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    mine, other = asyncio.ensure_future(work), asyncio.ensure_future(left())
    try:
        await asyncio.wait({mine, other}, return_when=asyncio.FIRST_COMPLETED)
        if mine.done():
            return mine.result()
        raise gone()
    finally:
        for task in (mine, other):
            if not task.done():
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError, Exception):
                    await task


def _text_of(whole: JSON) -> str:
    (choice,) = whole["choices"]
    return choice["message"]["content"] if "message" in choice else choice["text"]


def gone() -> Refused:
    """Makes the error of a client that has gone, and will not read it."""
    return Refused(499, "the client has gone, nobody reads this.", "gone")


class Events(EventSourceResponse):
    """A stream of events; what has to be done at its end is done however it ends.

    A generator that has not begun has no end of its own.
    """

    def __init__(self, parts: AsyncIterator[JSON], end: Callable[[], None]):
        super().__init__(parts)
        self._end = end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._end()


def _http_error(request: Request, error: Any) -> Response:
    path, headers = request.scope["path"][:80], dict(error.headers or {})
    said = f"{error.detail}: {path!r}, use one of the paths of docs/serve.md."
    if "Allow" in headers:
        said = f"{request.method[:20]} is not for {path!r}: use {headers['Allow']}."
    return response(Refused(error.status_code, said, "http", **headers))
