"""What holds an endpoint's client back: the requests a minute, the server's pauses, the money."""

from __future__ import annotations

import threading
import time


class RateLimit:
    """Spaces the starts of calls evenly, and holds all of them while the server asks for a pause.

    Safe to share between threads.
    """

    def __init__(self, per_minute: float | None = None) -> None:
        self._gap = 60.0 / per_minute if per_minute else 0.0
        self._next = 0.0
        self._lock = threading.Lock()

    def wait(self, stop: threading.Event) -> None:
        """Returns when this call may start, or at once after `stop` was set."""
        while not stop.is_set():
            with self._lock:
                now = time.monotonic()
                if now >= self._next:
                    self._next = now + self._gap
                    return
                left = self._next - now
            stop.wait(left)

    def pause(self, seconds: float) -> None:
        """No call starts for so long."""
        with self._lock:
            self._next = max(self._next, time.monotonic() + seconds)


class Budget:
    """Money set aside before a call and settled after it, so that a cap is never passed.

    Safe to share between threads.
    """

    def __init__(self, cap: float | None, spent: float = 0.0) -> None:
        self.cap = cap
        self.spent = spent
        self._reserved = 0.0
        self._changed = threading.Condition()

    def reserve(self, most: float) -> bool:
        """Sets `most` aside; False when the cap does not allow it.

        While calls under way may still turn out cheaper than what is set aside for them, waits.
        """
        with self._changed:
            while self.cap is not None and self.spent + self._reserved + most > self.cap:
                if self._reserved <= 0 or self.spent + most > self.cap:
                    return False
                self._changed.wait()
            self._reserved += most
            return True

    def settle(self, reserved: float, cost: float) -> None:
        """Gives back what was set aside and counts what was paid."""
        with self._changed:
            self._reserved = max(self._reserved - reserved, 0.0)
            self.spent += cost
            self._changed.notify_all()
