"""What a server may be told."""

from __future__ import annotations

import ipaddress
import math
from dataclasses import dataclass


@dataclass(frozen=True)
class ServerSettings:
    """
    Attributes:
        model: the name that clients call the model by.
        api_keys: a client must send one of them as a bearer token; none: nobody needs one.
        max_body_bytes: of a request.
        max_choices: continuations of one request, those of all its prompts together.
        requests_per_minute: of each key, or of each address where there are no keys; None: any number.
        body_seconds: in which a request must have begun, and then have arrived.
        request_seconds: in which it must be answered.
        unread_seconds: a client that takes nothing of what is sent for so long is gone (on Linux).
        ping_seconds: after so long a silence a stream sends a comment.
        drain_seconds: after SIGTERM, those in progress may take that long.

    Raises:
        ValueError: a value out of range, or a host that others reach without a key.
    """

    model: str
    host: str = "127.0.0.1"
    port: int = 8000
    api_keys: tuple[str, ...] = ()
    max_body_bytes: int = 8 << 20
    max_choices: int = 128
    max_connections: int = 1024
    requests_per_minute: int | None = None
    body_seconds: float = 30.0
    request_seconds: float = 600.0
    unread_seconds: float = 60.0
    ping_seconds: float = 15.0
    drain_seconds: float = 30.0

    def __post_init__(self) -> None:
        for name in ("max_body_bytes", "max_choices", "max_connections", "requests_per_minute", "body_seconds",
                     "request_seconds", "unread_seconds", "ping_seconds"):  # fmt: skip
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"serve: {name}: expected a number above 0, got {value!r}")
        if not 0 <= self.drain_seconds < math.inf:
            raise ValueError(f"serve: drain_seconds: expected a finite number >= 0, got {self.drain_seconds!r}")
        if not 0 <= self.port < 65536:
            raise ValueError(f"serve: port: expected one from 0 to 65535, got {self.port!r}")
        if not all(self.api_keys):
            raise ValueError("serve: api_keys: expected keys of at least one character, got an empty one")
        if not self.api_keys and not self.loopback:
            problem = f"{self.host} can be reached from other machines"
            raise ValueError(f"serve: host: {problem}: give an API key, too (FASTSFT_API_KEY)")

    @property
    def loopback(self) -> bool:
        """Whether this machine alone can connect."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False
