"""Text to token ids and back, from the files that lie in a bundle.

Uses `tokenizers`; transformers is never imported here. Encoding takes up to 420 bytes of memory for a byte of text, so
a long text is encoded in pieces, cut where that is proved to change nothing (text_cuts.py), and no further than asked
for. chat_template.py makes a text of messages.
"""

from contextlib import suppress
from pathlib import Path

from .text_cuts import Cuts
from .tokenizer_file import library_errors, read_tokenizer

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"  # what an unfinished UTF-8 sequence decodes to
ENCODING = 450  # bytes of memory that a byte of text takes while it is encoded, at most; 415 were measured
PIECE = 4096  # characters of text that are encoded at once, where it can be cut
ENCODING_ROOM = 6_000_000  # bytes of memory that encoding or rendering may always take: half of what a plan spares


class Tokenizer:
    """The tokenizer of a bundle or checkpoint directory; `chat_template` is None where it has none.

    Raises ValueError for damaged files.
    """

    def __init__(self, directory: str | Path):
        self.directory = Path(directory)
        found = read_tokenizer(self.directory)
        self.backend, self.special, self.chat_templates = found.backend, found.named, found.chat_templates
        self._growth, self._longest = found.growth, 0
        self._cuts = Cuts(self.backend)
        added = self.backend.get_added_tokens_decoder().items()
        self._special_ids = {token.content: index for index, token in added if token.special}
        self._around: tuple[list[int], list[int]] | None = None  # special tokens before and behind every text
        self._templates: dict[str, object] = {}  # compiled, by name

    @property
    def chat_template(self) -> str | None:
        return self.chat_templates.get("default")

    @property
    def end_token(self) -> int | None:
        """The id of the token that ends a turn by tokenizer_config.json, where it names one."""
        end = self.special.get("eos_token")
        return None if end is None else self.backend.token_to_id(end)

    @property
    def longest_token_bytes(self) -> int:
        """At least as many bytes as any one token stands for, in UTF-8."""
        if not self._longest:
            size = self.backend.get_vocab_size(with_added_tokens=True)
            texts = (self.backend.id_to_token(token) for token in range(size))
            added = (token.content for token in self.backend.get_added_tokens_decoder().values())
            self._longest = max(1, *(len(text.encode()) for text in (*added, *(text for text in texts if text))))
        return self._longest

    def special_token(self, text: str) -> int | None:
        """The id of the special token that this text is, which decode() leaves out; None where it is none."""
        return self._special_ids.get(text)

    def encode(self, text: str, most: int | None = None, room_bytes: int | None = None) -> list[int]:
        """Token ids of a text, special tokens included.

        most: a number of tokens; a text of more is encoded no further than to where that shows, so that more than
        `most` ids mean that there are at least so many. room_bytes: of memory that encoding may take. Raises ValueError
        for text with half a surrogate pair, or that cannot be cut and takes more than the room.
        """
        return self._encode(text, True, most, room_bytes)

    def decode(self, ids) -> str:
        with library_errors(f"{self.directory / 'tokenizer.json'}: cannot decode these tokens"):
            return self.backend.decode([int(token) for token in ids], skip_special_tokens=True)

    def apply_chat_template(
        self,
        messages: list[dict],
        *,
        tools: list[dict] | None = None,
        documents: list[dict] | None = None,
        add_generation_prompt: bool | None = None,
        continue_final_message: bool | str = False,
        chat_template_kwargs: dict | None = None,
        most: int | None = None,
        room_bytes: int | None = None,
    ) -> list[int]:
        """Token ids of a conversation, ready for the assistant's answer.

        messages: [{"role": "user", "content": "..."}, ...], or with parts [{"type": "text", "text": "..."}] as content;
        a key whose value is None is as if it were not there. tools: JSON schemas of functions; documents: what to
        answer from. add_generation_prompt: begin the assistant's turn, the default but with continue_final_message,
        which leaves the last message open instead, or its field of that name. chat_template_kwargs: what else the
        template knows, as enable_thinking. most, room_bytes: as for encode().

        Raises ValueError when there is no template, or it refuses the messages or takes more than the room.
        """
        if not self.chat_templates:
            raise ValueError("this model has no chat template; pass a prompt as text")
        from .chat_template import render

        text = render(
            self._template(
                "tool_use" if tools is not None and "tool_use" in self.chat_templates else "default", room_bytes
            ),
            messages,
            tools=tools,
            documents=documents,
            add_generation_prompt=not continue_final_message
            if add_generation_prompt is None
            else add_generation_prompt,
            continue_final_message=continue_final_message,
            variables={**self.special, **(chat_template_kwargs or {})},
            room_bytes=room_bytes,
        )
        return self._encode(text, False, most, room_bytes)

    def prepare_chat(self, room_bytes: int | None = None) -> None:
        """Compile the chat templates, which may take room_bytes of memory; one at fault says so when it is used."""
        for name in {"default", "tool_use"} & self.chat_templates.keys():
            with suppress(ValueError):
                self._template(name, room_bytes)

    def _template(self, name: str, room_bytes: int | None):
        from .chat_template import ChatTemplate

        if name not in self.chat_templates:
            named = ", ".join(self.chat_templates)
            raise ValueError(f"this model has no chat template for these messages, only {named}; pass a prompt as text")
        if name not in self._templates:
            self._templates[name] = ChatTemplate(self.chat_templates[name], room_bytes)
        return self._templates[name]

    def _encode(self, text: str, special: bool, most: int | None, room_bytes: int | None) -> list[int]:
        if not isinstance(text, str):
            raise TypeError(f"the text is {type(text).__name__}, expected str")
        before, behind = self._specials() if special else ([], [])
        ids = list(before)
        for piece in self._cuts.pieces(text, max(64, PIECE // self._growth)):
            if most is not None and len(ids) + len(behind) > most:
                return ids + behind
            ids += self._encode_piece(piece, text, room_bytes)
        return ids + behind

    def _encode_piece(self, piece: str, text: str, room_bytes: int | None) -> list[int]:
        try:
            size = len(piece.encode())
        except UnicodeEncodeError as error:
            at = error.start if piece is text else text.index(piece) + error.start
            raise ValueError(f"the text cannot be encoded: {error.reason} at character {at}") from None
        takes = size * self._growth * ENCODING
        if room_bytes is not None and takes > room_bytes:
            raise ValueError(
                f"{size:,} bytes of the prompt have no place where they could be cut, and encoding them takes up to "
                f"{takes / 1e6:,.0f} MB, where the cap leaves {room_bytes / 1e6:,.0f}; shorten them or raise the cap"
            )
        with library_errors(f"{self.directory / 'tokenizer.json'}: cannot encode this text"):
            return self.backend.encode(piece, add_special_tokens=False).ids

    def _specials(self) -> tuple[list[int], list[int]]:
        """What the post-processor puts before and behind a text."""
        if self._around is None:
            with library_errors(f"{self.directory / 'tokenizer.json'}: cannot encode a text"):
                bare = self.backend.encode("a", add_special_tokens=False).ids
                whole = self.backend.encode("a", add_special_tokens=True).ids
            at = next((i for i in range(len(whole) - len(bare) + 1) if whole[i : i + len(bare)] == bare), len(whole))
            self._around = whole[:at], whole[at + len(bare) :]
        return self._around


def tokenizer_of(directory: Path) -> Tokenizer | None:
    """The tokenizer of a bundle or checkpoint directory, where it has one."""
    return Tokenizer(directory) if (directory / "tokenizer.json").is_file() else None


class Detokenizer:
    """Turns tokens into text one at a time, holding back what is not yet a whole character.

    A token's text may depend on the one before it, so a short window is decoded each time and compared with the
    window without the new tokens.
    """

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        self.tokens: list[int] = []
        self.start = 0  # of the window
        self.shown = 0  # tokens whose text is out

    def add(self, token: int) -> str:
        """The text that this token completes, often empty in the middle of a character."""
        self.tokens.append(token)
        before = self.tokenizer.decode(self.tokens[self.start : self.shown])
        now = self.tokenizer.decode(self.tokens[self.start :])
        if now.endswith(REPLACEMENT):
            return ""
        if len(now) > len(before):  # else the window keeps its start: a special token alone is no context
            self.start = self.shown
        self.shown = len(self.tokens)
        return now[len(before) :]

    def finish(self) -> str:
        """What was held back, as it is."""
        before = self.tokenizer.decode(self.tokens[self.start : self.shown])
        now = self.tokenizer.decode(self.tokens[self.start :])
        self.start = self.shown = len(self.tokens)
        return now[len(before) :]
