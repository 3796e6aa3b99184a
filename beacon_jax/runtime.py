"""Prepares JAX before its backend starts: threads of CPU devices, compiled programs.

XLA's CPU client has max(cores, devices) threads. With jax 0.11 one pool runs the
launches of all devices and what they launch. A collective needs a thread of every
device at the same time; launches that wait for their turn can hold all threads, and
then the program hangs until XLA aborts it (`rendezvous.cc: ... Termination timeout`).
Either of two things prevents that, and the package does both: `prepare` asks for two
threads per device, and `launched` keeps the number of launches in flight small. jax
0.12 has a pool of its own for launches (PJRT_NPROC sizes it as well), and there
`make stress` found no hang with neither; which other versions hang is not known.

Importing this module does not import jax.
"""

import collections
import functools
import logging
import os
import re
import sys
import warnings
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

POOL = "PJRT_NPROC"  # read once, when the CPU backend starts
THREADS_PER_DEVICE = 2  # measured: 3 threads for 2 devices hang, 4 do not
IN_FLIGHT = 16  # launches; beyond 32 XLA's own dispatch threads begin to wait
# XLA aborts a program whose devices do not meet in a collective within 40 s. Two at
# nice 19 beside a load of 24 on two cores needed 25 s. With threads for all of them
# nothing hangs, so that waiting longer costs nothing.
TIMEOUT = "--xla_cpu_collective_call_terminate_timeout_seconds"
TIMEOUT_SECONDS = 600
MIN_COMPILE_SECONDS = 1.0  # what compiles faster is not worth a file

# Loggers of other libraries, and what of theirs is not for the user of a command.
QUIET = {
    "jax": logging.WARNING,  # looks for a TPU where there is none
    "matplotlib.font_manager": logging.ERROR,  # builds its cache once
    "orbax": logging.ERROR,
    # "Token indices sequence length is longer than ...": long texts are the point.
    "transformers.tokenization_utils_base": logging.ERROR,
    "absl": logging.WARNING,
}


# --- command lines ---------------------------------------------------------------


def for_command() -> None:
    """Prepares a command that computes.

    Programs of earlier runs are at hand. Lines of other libraries that are not for its
    user stay away.
    """
    quiet()
    enable_compilation_cache()


def quiet() -> None:
    """Raises the log levels of other libraries; errors of theirs still appear."""
    for name, level in QUIET.items():
        logging.getLogger(name).setLevel(level)


# --- threads of CPU devices ------------------------------------------------------


def prepare() -> None:
    """Gives a CPU backend of several devices two threads each, and longer timeouts.

    Costs microseconds; call it before whatever may start the backend. The number of
    devices comes from JAX_NUM_CPU_DEVICES, jax.config.jax_num_cpu_devices or
    XLA_FLAGS=--xla_force_host_platform_device_count. A larger PJRT_NPROC stays, and so
    does a timeout of collectives in XLA_FLAGS.

    Warns:
      RuntimeWarning: once, if PJRT_NPROC was set to less, which is raised; or if the
        backend runs already with too few threads, which nothing can change.
    """
    started = _started_devices()
    devices = _asked_devices() if started is None else started
    least, has = THREADS_PER_DEVICE * devices, _pool_size()
    if devices > 1 and started is None and TIMEOUT not in _flags():
        os.environ["XLA_FLAGS"] = f"{_flags()} {TIMEOUT}={TIMEOUT_SECONDS}".strip()
    if devices < 2 or has >= least:
        return
    if started is not None:
        _warn_once(
            f"jax runs {devices} CPU devices on {max(has, devices)} threads: programs "
            f"that are split over them can hang. Set {POOL}={least} in the "
            "environment, or import beacon_jax before the first use of jax."
        )
        return
    if _integer(POOL) is not None:
        _warn_once(
            f"{POOL}={os.environ[POOL]} is too small for {devices} CPU devices, which "
            f"can hang: it is now {least}."
        )
    os.environ[POOL] = str(least)


def _asked_devices() -> int:
    """Counts the CPU devices of the backend to be, from jax's config or environment."""
    config = getattr(sys.modules.get("jax"), "config", None)
    asked = getattr(config, "jax_num_cpu_devices", None)
    if asked is None:  # jax is not imported yet
        asked = _integer("JAX_NUM_CPU_DEVICES")
    if asked is not None and asked > 0:
        return asked
    forced = re.findall(r"--xla_force_host_platform_device_count=(\d+)", _flags())
    return int(forced[-1]) if forced else 1


def _flags() -> str:
    return os.environ.get("XLA_FLAGS", "")


def _started_devices() -> int | None:
    """Counts the devices of the CPU backend that runs and that arrays go to.

    1: another platform is the default; None: no backend has started.
    """
    bridge = sys.modules.get("jax._src.xla_bridge")  # jax has no public way to ask
    if bridge is None or not bridge.backends_are_initialized():
        return None
    jax = sys.modules["jax"]
    return jax.local_device_count() if jax.default_backend() == "cpu" else 1


def _pool_size() -> int:
    """Counts the threads of XLA's CPU pools: PJRT_NPROC, NPROC, else all cores."""
    for name in (POOL, "NPROC"):
        if (asked := _integer(name)) is not None:
            return asked
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _integer(name: str) -> int | None:
    """Reads an environment variable; None if it is not a number."""
    try:
        return int(os.environ[name])
    except (KeyError, ValueError):
        return None


@functools.cache
def _warn_once(text: str) -> None:
    warnings.warn(text, RuntimeWarning, stacklevel=3)


# --- launches in flight ----------------------------------------------------------


class LaunchLimit:
    """Keeps launches on several CPU devices from running far ahead of the devices.

    Call it with what each launch returns. It waits for the launch of `most` calls
    before; on one device, on accelerators and while tracing it does nothing.
    """

    def __init__(self, most: int = IN_FLIGHT):
        self._most = most
        self._ahead: collections.deque[Any] = collections.deque()

    def __call__(self, result: Any) -> None:
        """Takes note of a launch, and waits if too many are on their way.

        Args:
          result: an array of this launch that is not donated to a later one.
        """
        if not _on_cpu_devices(result):
            return
        while self._ahead and _done(self._ahead[0]):
            self._ahead.popleft()
        self._ahead.append(result)
        if len(self._ahead) > self._most:
            self._ahead.popleft().block_until_ready()


def _done(array: Any) -> bool:
    return array.is_deleted() or array.is_ready()


def _on_cpu_devices(x: Any) -> bool:
    """Tells whether x is an array, not a tracer, that several CPU devices share."""
    jax = sys.modules["jax"]
    if not isinstance(x, jax.Array) or isinstance(x, jax.core.Tracer):
        return False
    devices = x.sharding.device_set
    return len(devices) > 1 and next(iter(devices)).platform == "cpu"


# Launches in flight are those of the whole process, whichever loop made them.
launched = LaunchLimit()


# --- compiled programs -----------------------------------------------------------


def cache_folder() -> Path:
    """Returns the default place of compiled programs, the user's alone."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "beacon_jax" / "xla"


def enable_compilation_cache(setting: str = "") -> str | None:
    """Keeps compiled programs in a folder; call it before the first compilation.

    Args:
      setting: "" for `cache_folder()`, unless jax has a folder already, as from
        JAX_COMPILATION_CACHE_DIR; "off"; or a folder, which may be a URL. Whoever can
        write there can run code as you. Nothing is ever deleted; you may at any time.

    Returns:
      The folder, or None if there is no cache.

    Raises:
      ValueError: the folder that was asked for cannot be written.
    """
    import jax  # this module serves before jax is imported

    if setting == "off":
        _use(None)
        return None
    if not setting and jax.config.jax_compilation_cache_dir:
        return jax.config.jax_compilation_cache_dir
    try:
        if "://" in setting:
            folder = setting
        elif setting:
            folder = _make(Path(setting).expanduser())
        else:
            folder = _make(cache_folder())
    except (OSError, RuntimeError) as error:  # RuntimeError: there is no home
        if setting:
            raise ValueError(
                f"compilation_cache={setting!r} cannot be written ({error}): name "
                "another folder, or 'off'."
            ) from error
        logger.warning("programs are compiled in every run: %s", error)
        return None
    _use(folder)
    return folder


def _make(folder: Path) -> str:
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK):
        raise PermissionError(f"no permission to write in {folder}")
    return str(folder.absolute())


def _use(folder: str | None) -> None:
    import jax
    from jax.experimental.compilation_cache import compilation_cache

    if jax.config.jax_compilation_cache_dir == folder:
        return
    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", MIN_COMPILE_SECONDS)
    compilation_cache.reset_cache()  # one that is open already would stay in use
