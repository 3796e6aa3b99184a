"""What the routes work with: a model, its engine, its memories, and its limits."""

import dataclasses
import threading
import time
from collections.abc import Callable

from beacon_jax.inference.model import Model
from beacon_jax.serving.device import Device
from beacon_jax.serving.engine import Engine, Shape
from beacon_jax.serving.metrics import Metrics
from beacon_jax.serving.reading import Reading
from beacon_jax.serving.store import Store
from beacon_jax.serving.turns import Turns


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a server does, and what it refuses.

    Attributes:
      rows: answers that grow at the same time.
      slots: of a row: memory, prompt and answer together.
      queue: requests that may wait, and as many texts.
      tokens: of one text.
      body: bytes of a request.
      ratio, method: of memories whose request names none.
      key: that clients have to know; None: none.
      seconds: that a client may take to send its request, and to take an event.
      connections: that may be open at the same time.
      local: only requests to a name of this machine are answered, so that a page of
        another site cannot reach the server by a name that it lets point here.
    """

    rows: int = 8
    slots: int = 8192
    queue: int = 64
    tokens: int = 2**20
    body: int = 64 * 2**20
    ratio: int | str | list[int] | None = None
    method: str | None = None
    key: str | None = None
    seconds: float = 30.0
    connections: int = 1024
    local: bool = False


class Service:
    """A server's parts; `ready` says when its programs are compiled.

    Attributes:
      name: of the model, as clients know it.
      failed: why they could not be; `on_failed` is called then.
      on_compiled: called with (sizes whose programs are compiled, of how many).
    """

    def __init__(
        self,
        model: Model,
        name: str,
        store: Store,
        limits: Limits,
        device: Device | None = None,
    ):
        """Makes the parts; `start` lets them work.

        Args:
          device: `followers.lead` makes that of several processes.
        """
        check_mesh(model)
        self.model, self.name, self.store, self.limits = model, name, store, limits
        self.created = int(time.time())
        self.metrics = Metrics()
        turns = Turns(needed=model.partition is not None)
        dtype = model.net.dtype.name
        shape = Shape(limits.rows, limits.slots, limits.queue, dtype)
        self.device = device or Device(model, limits.rows, dtype)
        self.engine = Engine(model, shape, self.metrics, turns, self.device)
        self.reading = Reading(
            self.device,
            store,
            turns,
            slots=limits.slots,
            queue=limits.queue,
            on_read=self.metrics.compressed.inc,
            on_biased=self.engine.warm_biased,
        )
        # Fast tokenizers are not made for threads that change padding and such.
        self.encoding = threading.Lock()
        # One expression is searched at a time: it may take a gigabyte for a moment.
        self.searching = threading.Lock()
        self.compiled, self.sizes = 0, len(self.engine.sizes)
        self.ready = threading.Event()
        self.failed: Exception | None = None
        self.on_failed = lambda: None
        self.on_compiled: Callable[[int, int], object] = lambda done, of: None
        self._compiling = threading.Thread(
            target=self._warm, name="compiling", daemon=True
        )

    def start(self) -> None:
        """Compiles all programs in a thread of its own, then begins to answer."""
        self._compiling.start()

    @property
    def running(self) -> bool:
        """Whether a thread of it is still at work."""
        parts = self.engine, self.reading
        return self._compiling.is_alive() or any(part.running for part in parts)

    def _warm(self) -> None:
        def done(sizes: int, of: int) -> None:
            self.compiled = sizes
            self.on_compiled(sizes, of)

        try:
            self.engine.warm(done)
            if any(about.get("biased") for about in self.store.all()):
                self.engine.warm_biased()
        except Exception as error:
            self.failed = error
            self.on_failed()
            return
        self.engine.start()
        self.ready.set()

    def close(self, seconds: float) -> None:
        """Finishes the answers that have begun, within `seconds`."""
        end = time.monotonic() + seconds
        self.reading.close(seconds)
        if self.ready.is_set():
            self.engine.close(max(end - time.monotonic(), 0.1))


def check_mesh(model: Model) -> None:
    """Raises ValueError for devices that rows would be split over.

    Prompts are read one by one, and one row cannot be split.
    """
    if model.partition is None:
        return
    rules, sizes = dict(model.partition.rules), model.partition.mesh.shape
    split = [axis for axis in rules.get("batch", ()) if sizes[axis] > 1]
    if split:
        raise ValueError(
            f"mesh axes {', '.join(split)} split rows, and a server reads them one by "
            "one: use --mesh=tensor:N, and N servers with one --store behind a load "
            "balancer."
        )
