"""Pieces: the tokens of a text, each with the characters it stands for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from typing_extensions import TypedDict  # that of `typing` says too little to pydantic before Python 3.12

from gist_ray.encoder import Encoder, TokenIds


class Piece(TypedDict):
    """A token as text-embeddings-inference describes it: `start` and `stop` are None for a special one."""

    id: int
    text: str
    special: bool
    start: int | None
    stop: int | None


class EncoderTexts:
    """The half of an engine that reads texts, by an encoder whose weights may be elsewhere."""

    def __init__(self, encoder: Encoder) -> None:
        self.encoder = encoder

    @property
    def max_tokens(self) -> int:
        """Longest text the model reads, special tokens included."""
        return self.encoder.max_tokens

    @property
    def prompts(self) -> Mapping[str, str]:
        """Prompt name to the text that is put before the input."""
        return self.encoder.prompts

    def tokenize(self, texts: Sequence[str], *, prompt: str = "", truncate: bool = True) -> list[TokenIds]:
        """As `Encoder.tokenize`."""
        return self.encoder.tokenize(texts, prompt=prompt, truncate=truncate)

    def pieces(self, texts: Sequence[str], *, prompt: str = "", special: bool = True) -> list[list[Piece]]:
        """Tokens of each text, not cut, without special ones if not `special`.

        `start` and `stop` count characters of prompt and text together.
        """
        return [_of_text(self.encoder, prompt + text, special) for text in texts]


def _of_text(encoder: Encoder, text: str, special: bool) -> list[Piece]:
    shift = len(text) - len(text.lstrip())  # what `Encoder.tokenize` leaves out
    read = text.strip().lower() if encoder.lower_case else text.strip()
    found: Any = encoder.tokenizer(
        read, add_special_tokens=special, return_offsets_mapping=True, return_special_tokens_mask=True, verbose=False
    )
    names = encoder.tokenizer.convert_ids_to_tokens(found["input_ids"])
    rows = zip(found["input_ids"], names, found["special_tokens_mask"], found["offset_mapping"], strict=True)
    return [
        Piece(id=number, text=name, special=True, start=None, stop=None)
        if is_special
        else Piece(
            id=number, text=text[start + shift : stop + shift], special=False, start=start + shift, stop=stop + shift
        )
        for number, name, is_special, (start, stop) in rows
    ]
