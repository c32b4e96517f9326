"""Pieces: the tokens of a text, each with the characters it stands for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypedDict

from gist_ray.encoder import Encoder


class Piece(TypedDict):
    """A token as text-embeddings-inference describes it."""

    id: int
    text: str
    special: bool
    start: int | None
    stop: int | None


def token_pieces(
    encoder: Encoder, texts: Sequence[str], *, prompt: str = "", special: bool = True
) -> list[list[Piece]]:
    """Tokens of each text, not cut, without special ones if not `special`.

    `start` and `stop` count characters of prompt and text together; a special token stands for none.
    """
    return [_of_text(encoder, prompt + text, special) for text in texts]


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
