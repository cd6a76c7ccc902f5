"""What a client may ask for at most, so that no request takes the memory or the time of the others."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Limits:
    queue: int = 64  # answers that wait for a sequence; more are refused with 429
    connections: int = 512  # open ones; more are refused with 503
    body_bytes: int = 4_000_000  # of one request
    bodies_bytes: int = 16_000_000  # of all requests that are being read and parsed
    timeout_s: float = 600.0  # for an answer, waiting included
    read_s: float = 30.0  # for a request to arrive
    stall_s: float = 30.0  # without a byte that the client takes
    grace_s: float = 10.0  # for running answers after the first signal to end
    answers: int = 128  # of one request: prompts x n
    stops: int = 16
    tools: int = 128
    schema_bytes: int = 200_000  # of a schema or grammar
    schema_depth: int = 32
    logprobs: int = 20
    ping_s: float = 10.0  # between signs of life in a stream without text

    @property
    def reserve_bytes(self) -> int:
        """Memory that requests may take: their bodies, parsed, and what waits to be sent."""
        return 2 * self.bodies_bytes + 64_000 * (self.queue + self.answers)
