"""Schema: what may be asked, and the numbers that bound it.

Unknown fields are refused: a misspelt `dimension`, ignored, would answer with wrong vectors. Fields that
common clients send without effect here (`user`) are listed as such.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StrictBool,
    StrictInt,
    StrictStr,
    WithJsonSchema,
)
from pydantic_core import PydanticCustomError

from gist_ray.serving.answers import OutputType

MAX_BODY_BYTES = 8 * 1024 * 1024
"""Largest request body."""
MAX_TEXTS = 2048
"""Most texts in one request, as OpenAI."""


def _texts(value: Any) -> list[str]:
    """A string or a list of strings, as a list; everything else is explained."""
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list):
        raise PydanticCustomError("not_texts", "must be a string or a list of strings")
    if not texts:
        raise PydanticCustomError("empty_input", "is empty; give at least one text")
    if len(texts) > MAX_TEXTS:
        raise PydanticCustomError(
            "too_many_texts",
            "has {count} texts and the limit is {limit}; split the request",
            {"count": len(texts), "limit": MAX_TEXTS},
        )
    for index, text in enumerate(texts):
        _check_text(index, text)
    return texts


def _check_text(index: int, text: Any) -> None:
    where = {"index": index}
    number = text[0] if isinstance(text, list) and text else text
    if isinstance(number, int) and not isinstance(number, bool):
        raise PydanticCustomError(
            "token_ids",
            "holds token ids at index {index}; this server takes text, as ids of another tokenizer would be "
            "read as other words. With langchain's OpenAIEmbeddings set check_embedding_ctx_length=False",
            where,
        )
    if not isinstance(text, str):
        raise PydanticCustomError("not_text", "must hold strings only, and item {index} is none", where)
    if not text:
        raise PydanticCustomError("empty_input", "holds an empty text at index {index}; leave it out", where)
    try:
        text.encode()
    except UnicodeEncodeError:
        raise PydanticCustomError(
            "not_unicode", "is not valid Unicode at index {index}: it holds half of a surrogate pair", where
        ) from None


def _text(value: Any) -> str:
    """One string."""
    if not isinstance(value, str):
        raise PydanticCustomError("not_text", "must be a string")
    return _texts(value)[0]


def _whole(value: Any) -> Any:
    """A number without a fraction is an integer, as in JSON Schema: some languages write 64 as 64.0."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


_TEXT_SCHEMA = {"type": "string", "minLength": 1}
_LIST_SCHEMA = {"type": "array", "items": _TEXT_SCHEMA, "minItems": 1, "maxItems": MAX_TEXTS}
Texts = Annotated[list[str], BeforeValidator(_texts), WithJsonSchema({"anyOf": [_TEXT_SCHEMA, _LIST_SCHEMA]})]
Text = Annotated[str, BeforeValidator(_text), WithJsonSchema(_TEXT_SCHEMA)]
Dimensions = Annotated[StrictInt, BeforeValidator(_whole), Field(ge=1)]


class _Request(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class OpenAIRequest(_Request):
    """`POST /v1/embeddings`."""

    input: Texts
    model: StrictStr | None = None
    """The name of a served model; None: the first."""
    encoding_format: Literal["float", "base64"] | None = None
    """None: float. base64: little-endian float32."""
    dimensions: Dimensions | None = None
    """Keep the first so many numbers, then bring the vector back to unit length."""
    output_dtype: OutputType | None = None
    """Extension: numbers of fewer bits, see `gist_ray.serving.answers`. None: float."""
    user: StrictStr | None = None
    """Accepted and not used."""
    prompt_name: StrictStr | None = None
    """Extension: which of the model's prompts to put before each text."""
    truncate: StrictBool = True
    """Extension. True: a text over the model's limit is cut. False: it is refused."""


class TeiRequest(_Request):
    """`POST /embed` and `POST /`, as text-embeddings-inference."""

    inputs: Texts
    normalize: StrictBool | None = None
    """False: a vector cut by `dimensions` keeps its shorter length. Uncut vectors are unit vectors anyway."""
    prompt_name: StrictStr | None = None
    truncate: StrictBool | None = None
    """None: as true."""
    truncation_direction: Literal["Right", "right"] | None = None
    """Only the end of a text can be cut."""
    dimensions: Dimensions | None = None
    output_dtype: OutputType | None = None
    """Extension, as in `/v1/embeddings`."""
    model: StrictStr | None = None
    """Extension: the name of a served model; None: the first."""


class SimilarityInputs(_Request):
    """One text and those to compare it with."""

    source_sentence: Text
    sentences: Texts


class SimilarityParameters(_Request):
    """How the texts of a similarity request are read."""

    truncate: StrictBool | None = None
    truncation_direction: Literal["Right", "right"] | None = None
    prompt_name: StrictStr | None = None


class SimilarityRequest(_Request):
    """`POST /similarity`, as text-embeddings-inference."""

    inputs: SimilarityInputs
    parameters: SimilarityParameters | None = None
    model: StrictStr | None = None
    """Extension: the name of a served model; None: the first."""


class TokenizeRequest(_Request):
    """`POST /tokenize`, as text-embeddings-inference."""

    inputs: Texts
    add_special_tokens: StrictBool = True
    prompt_name: StrictStr | None = None
    model: StrictStr | None = None
    """Extension: the name of a served model; None: the first."""


class ErrorBody(BaseModel):
    """The OpenAI error object."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorResponse(BaseModel):
    """The body of every answer that is not 2xx."""

    error: ErrorBody


class OpenAIEmbedding(BaseModel):
    """One vector: an array of numbers, or base64 of their bytes, little-endian."""

    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class Usage(BaseModel):
    """Tokens that the model read, special tokens included."""

    prompt_tokens: int
    total_tokens: int


class OpenAIResponse(BaseModel):
    """Documents the answer; the server writes it from the vectors, without a Python object per number."""

    object: Literal["list"]
    data: list[OpenAIEmbedding]
    model: str
    usage: Usage


class ModelCard(BaseModel):
    """One served model."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str


class ModelList(BaseModel):
    """`GET /v1/models`."""

    object: Literal["list"]
    data: list[ModelCard]


class Info(BaseModel):
    """`GET /info`, with the field names of text-embeddings-inference."""

    model_id: str
    model_dtype: str
    max_input_length: int
    max_batch_tokens: int
    max_client_batch_size: int
    auto_truncate: bool
    version: str
    dim: int
    prompts: list[str]
