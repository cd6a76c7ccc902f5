"""What a client may ask for at most, so that no request takes the memory or the time of the others."""

from dataclasses import dataclass

TOKEN_BYTES = 36  # of a token's id in a list
ENTRY_BYTES = 600  # of a log probability in the body of an answer, and in its JSON text
VOCAB_BYTES = 500  # of llguidance, for a token of the vocabulary; 440 were measured
GRAMMAR_BYTES = 10_000_000  # of a grammar while an answer is computed


@dataclass(frozen=True, slots=True)
class Limits:
    queue: int = 64  # answers that wait for a sequence; more are refused with 429
    connections: int = 512  # open ones; more are refused with 503
    queue_tokens: int = 250_000  # of prompts that wait
    body_bytes: int = 4_000_000  # of one request
    bodies_bytes: int = 24_000_000  # of memory for bodies, parsed
    answers_bytes: int = 16_000_000  # of memory for what clients have not taken yet
    entries: int = 20_000  # log probabilities in an answer that is not streamed
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

    def reserve_bytes(self, vocab: int, sequences: int, shapes: bool) -> int:
        """Memory that requests may take. shapes: whether answers may have one."""
        waiting = TOKEN_BYTES * self.queue_tokens + 16_000 * (self.queue + self.answers)
        whole = ENTRY_BYTES * self.entries  # of one body, which is made at a time
        grammars = VOCAB_BYTES * vocab + GRAMMAR_BYTES * sequences if shapes else 0
        return self.bodies_bytes + 3 * self.answers_bytes // 2 + waiting + whole + grammars
