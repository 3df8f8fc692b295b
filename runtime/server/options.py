"""What a server allows and where it listens."""

from __future__ import annotations

from dataclasses import dataclass, field

from angelforge.errors import UsageError

_LONGEST = 86_400  # seconds


@dataclass(frozen=True)
class ServerOptions:
    """Raises UsageError if a value makes no sense."""

    model: str  # the name that requests ask for
    host: str = "127.0.0.1"
    port: int = 8000  # 0: any that is free
    api_key: str | None = field(default=None, repr=False)  # what requests to /v1 must show; None: nothing
    max_body: int = 16 * 2**20  # bytes of a request
    max_requests: int = 256  # open at once, waiting ones included
    max_tokens: int = 256  # of a completion that does not say; a chat's default is the rest of the context
    max_choices: int = 16  # `n`, and so many times as many prompts in one request as that
    drain_seconds: float = 30.0  # that open requests get when the server is told to end
    stall_seconds: float = 60.0  # that a client may leave a stream unread, or a body unsent

    def __post_init__(self) -> None:
        for name in ("max_body", "max_requests", "max_tokens", "max_choices"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} is {getattr(self, name)}, but at least 1 is needed.")
        if not 0 <= self.port < 2**16:
            raise UsageError(f"The port is {self.port}, but 0 to 65535 are possible.")
        if self.api_key is not None and (not self.api_key.isascii() or not self.api_key.strip()):
            raise UsageError("The API key is empty or has characters that HTTP headers cannot carry.")
        # These also hold for nan.
        if not 0 <= self.drain_seconds <= _LONGEST:
            raise UsageError(f"drain_seconds is {self.drain_seconds:g}, but 0 to {_LONGEST} are possible.")
        if not 0 < self.stall_seconds <= _LONGEST:
            raise UsageError(f"stall_seconds is {self.stall_seconds:g}, but above 0, to {_LONGEST}, is possible.")
