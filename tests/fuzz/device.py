"""Counts what the devices are given to do: errors have to come before."""

import jax


class Device:
    """Counts what the devices are given to do."""

    def __init__(self) -> None:
        self.count = 0
        put = jax.device_put

        def counted(*given, **options):
            self.count += 1
            return put(*given, **options)

        jax.device_put = counted
        jax.monitoring.register_event_duration_secs_listener(self._compiled)

    def _compiled(self, event: str, seconds: float, **more) -> None:
        self.count += "backend_compile" in event

    def reset(self) -> None:
        """Counts from zero again."""
        self.count = 0


DEVICE = Device()
