"""The text and the bytes of single tokens, for the log probabilities that clients ask for."""

from typing import Any

from ..runtime.sampling import TokenLogprobs
from ..runtime.tokenizer import Tokenizer

# The characters that byte-level tokenizers have for bytes without a visible one (GPT-2).
VISIBLE = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
BYTES = {chr(byte): byte for byte in VISIBLE}
BYTES |= {chr(256 + place): byte for place, byte in enumerate(byte for byte in range(256) if byte not in VISIBLE)}


class TokenTexts:
    """Special tokens have their own text."""

    def __init__(self, tokenizer: Tokenizer | None) -> None:
        self.backend: Any = None if tokenizer is None else tokenizer.backend
        self.added = (
            {} if self.backend is None else {i: t.content for i, t in self.backend.get_added_tokens_decoder().items()}
        )
        self.byte_level = self.backend is not None and "ByteLevel" in f"{self.backend.decoder}"

    def bytes_of(self, token: int) -> bytes:
        """A token's bytes; empty for one that the tokenizer does not have."""
        if token in self.added:
            return self.added[token].encode()
        text = None if self.backend is None else self.backend.id_to_token(token)
        if text is None:
            return b""
        if self.byte_level:
            return bytes(BYTES[sign] for sign in text) if all(sign in BYTES for sign in text) else text.encode()
        if len(text) == 6 and text.startswith("<0x") and text.endswith(">"):
            return bytes([int(text[3:5], 16)])
        return text.replace("▁", " ").encode()

    def text_of(self, token: int) -> str:
        return self.bytes_of(token).decode(errors="replace")

    def key_of(self, token: int) -> str:
        """A text that no other token has, as OpenAI's completions name tokens that are parts of characters."""
        its = self.bytes_of(token)
        try:
            return its.decode() if its else f"<{token}>"
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in its)

    def logprobs_of(self, told: list[TokenLogprobs]) -> list[dict]:
        """The log probabilities of tokens, as OpenAI's newer APIs give them; JSON has no infinity, so it is -9999."""

        def of(token: int, logprob: float) -> dict:
            its = self.bytes_of(token)
            return {"token": its.decode(errors="replace"), "logprob": max(logprob, -9999.0), "bytes": list(its)}

        return [{**of(one.token, one.logprob), "top_logprobs": [of(*top) for top in one.top_logprobs]} for one in told]
