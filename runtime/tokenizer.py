"""Converting text to token ids and back, with the tokenizer files of a bundle.

It uses `tokenizers`; transformers is never imported. Encoding takes up to 420 bytes of memory per byte of text, so a
long text is encoded in pieces, cut where that provably changes nothing (text_cuts.py), and no further than needed.
chat_template.py renders messages to a text.
"""

from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from .text_cuts import Cuts
from .tokenizer_file import library_errors, read_tokenizer

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"  # an incomplete UTF-8 sequence decodes to this
ENCODING = 450  # upper bound of memory in bytes for encoding one byte of text; 415 were measured
PIECE = 4096  # characters that are encoded at a time, if the text can be cut
ENCODING_ROOM = 6_000_000  # bytes of memory that encoding or rendering may always take: half of a plan's spare memory


class Tokenizer:
    """The tokenizer of a bundle or checkpoint directory; `chat_template` is None if it has none.

    Raises ValueError for damaged files.
    """

    def __init__(self, directory: str | Path):
        self.directory = Path(directory)
        found = read_tokenizer(self.directory)
        self.backend, self.special, self.chat_templates = found.backend, found.named, found.chat_templates
        self._growth, self._longest = found.growth, 0
        self._cannot_decode = f"{self.directory / 'tokenizer.json'}: cannot decode these tokens"
        self._cuts = Cuts(self.backend)
        added = self.backend.get_added_tokens_decoder().items()
        self._special_ids = {token.content: index for index, token in added if token.special}
        self._around: tuple[list[int], list[int]] | None = None  # special tokens before and after every text
        self._templates: dict[str, object] = {}  # compiled, by name

    @property
    def chat_template(self) -> str | None:
        return self.chat_templates.get("default")

    @property
    def end_token(self) -> int | None:
        """The id of the token that ends a turn, if tokenizer_config.json names one."""
        end = self.special.get("eos_token")
        return None if end is None else self.backend.token_to_id(end)

    @property
    def longest_token_bytes(self) -> int:
        """Upper bound of the UTF-8 bytes of one token."""
        if not self._longest:
            size = self.backend.get_vocab_size(with_added_tokens=True)
            texts = (self.backend.id_to_token(token) for token in range(size))
            added = (token.content for token in self.backend.get_added_tokens_decoder().values())
            self._longest = max(1, *(len(text.encode()) for text in (*added, *(text for text in texts if text))))
        return self._longest

    def special_token(self, text: str) -> int | None:
        """The id of the special token with this text, which decode() omits; None if there is none."""
        return self._special_ids.get(text)

    def special_token_at(self, text: str) -> set[int]:
        """The id of the special token that a text begins with, after white space; empty if there is none."""
        begun = text.lstrip()
        found = max((token for token in self._special_ids if begun.startswith(token)), key=len, default=None)
        return set() if found is None else {self._special_ids[found]}

    def has_special(self, ids: Iterable[int], text: str) -> bool:
        """Whether a text has one of these special tokens."""
        wanted = set(ids)
        return any(token in text for token, index in self._special_ids.items() if index in wanted)

    def encode(self, text: str, most: int | None = None, room_bytes: int | None = None) -> list[int]:
        """The token ids of a text, special tokens included.

        most: a maximum of tokens; a longer text is encoded only until it exceeds this, so more than `most` ids are a
        lower bound. room_bytes: memory that encoding may take. Raises ValueError for text with half a surrogate pair,
        or that cannot be cut and takes more than room_bytes.
        """
        return self._encode(text, True, most, room_bytes)

    def decode(self, ids) -> str:
        with library_errors(self._cannot_decode):
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
        """The token ids of a conversation, ready for the assistant's answer.

        messages: [{"role": "user", "content": "..."}, ...], or with parts [{"type": "text", "text": "..."}] as content;
        a key with the value None counts as absent. tools: JSON schemas of functions; documents: texts to answer from.
        add_generation_prompt: begin the assistant's turn, which is the default without continue_final_message, which
        instead leaves the last message, or its field of that name, open. chat_template_kwargs: other variables of the
        template, such as enable_thinking. most, room_bytes: as for encode().

        Raises ValueError if there is no template, or if it refuses the messages or takes more than room_bytes.
        """
        text = self.render_chat(
            messages,
            tools=tools,
            documents=documents,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            chat_template_kwargs=chat_template_kwargs,
            room_bytes=room_bytes,
        )
        return self._encode(text, False, most, room_bytes)

    def render_chat(
        self,
        messages: list[dict],
        *,
        tools: list[dict] | None = None,
        documents: list[dict] | None = None,
        add_generation_prompt: bool | None = None,
        continue_final_message: bool | str = False,
        chat_template_kwargs: dict | None = None,
        room_bytes: int | None = None,
    ) -> str:
        """The text of a conversation; the arguments and errors are those of apply_chat_template()."""
        if not self.chat_templates:
            raise ValueError("this model has no chat template; pass a prompt as text")
        from .chat_template import render

        name = "tool_use" if tools is not None and "tool_use" in self.chat_templates else "default"
        begins_answer = not continue_final_message if add_generation_prompt is None else add_generation_prompt
        return render(
            self._template(name, room_bytes),
            messages,
            tools=tools,
            documents=documents,
            add_generation_prompt=begins_answer,
            continue_final_message=continue_final_message,
            variables={**self.special, **(chat_template_kwargs or {})},
            room_bytes=room_bytes,
        )

    def prepare_chat(self, room_bytes: int | None = None) -> None:
        """Compile the chat templates in at most room_bytes of memory; a faulty one raises its error when it is used."""
        for name in {"default", "tool_use"} & self.chat_templates.keys():
            with suppress(ValueError):
                self._template(name, room_bytes)

    def reads_reasoning(self, room_bytes: int | None = None) -> bool:
        """Whether the default chat template takes the reasoning of a message apart from its content."""
        with suppress(ValueError):  # of a faulty template, whose error is raised when it is used
            return self._template("default", room_bytes).reads_reasoning()
        return False

    def template_variables(self, room_bytes: int | None = None) -> set[str]:
        """The names of variables in the default chat template; none if it is faulty."""
        with suppress(ValueError):
            return self._template("default", room_bytes).environment.variables
        return set()

    def template_keys(self, room_bytes: int | None = None) -> set[str]:
        """The names of attributes and the texts in the default chat template; none if it is faulty."""
        with suppress(ValueError):
            return self._template("default", room_bytes).environment.keys
        return set()

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
        """The special tokens that the post-processor puts before and after a text."""
        if self._around is None:
            with library_errors(f"{self.directory / 'tokenizer.json'}: cannot encode a text"):
                bare = self.backend.encode("a", add_special_tokens=False).ids
                whole = self.backend.encode("a", add_special_tokens=True).ids
            at = next((i for i in range(len(whole) - len(bare) + 1) if whole[i : i + len(bare)] == bare), len(whole))
            self._around = whole[:at], whole[at + len(bare) :]
        return self._around


def tokenizer_of(directory: Path) -> Tokenizer | None:
    """The tokenizer of a bundle or checkpoint directory, or None."""
    return Tokenizer(directory) if (directory / "tokenizer.json").is_file() else None


class Detokenizer:
    """Converts tokens to text one at a time, and holds incomplete characters back.

    A token's text may depend on the token before it, so a short window is decoded each time and compared with the
    window without the new tokens.
    """

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        self.tokens: list[int] = []
        self.start = 0  # of the window
        self.shown = 0  # tokens whose text has been returned

    def add(self, token: int) -> str:
        """Add a token and return the text that it completes, which may be empty in the middle of a character."""
        self.tokens.append(token)
        before = self.tokenizer.decode(self.tokens[self.start : self.shown])
        now = self.tokenizer.decode(self.tokens[self.start :])
        if now.endswith(REPLACEMENT):
            return ""
        if len(now) > len(before):  # otherwise the window keeps its start: a special token alone is not enough context
            self.start = self.shown
        self.shown = len(self.tokens)
        return now[len(before) :]

    def finish(self) -> str:
        """Return the text held back."""
        before = self.tokenizer.decode(self.tokens[self.start : self.shown])
        now = self.tokenizer.decode(self.tokens[self.start :])
        self.start = self.shown = len(self.tokens)
        return now[len(before) :]
