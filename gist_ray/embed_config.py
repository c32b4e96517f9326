"""The settings of `embed`: frozen, typed trees, as a recipe is."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator, model_validator

from gist_ray.config import ClusterConfig, SourceConfig
from gist_ray.section import Section
from gist_ray.serving_config import Backend, Precision

NumberType = Literal["float32", "float16", "int8", "binary", "ubinary"]


class VectorConfig(Section):
    """What decides the vector of a text."""

    model: str
    """Model folder or Hub id."""
    prompt_name: str | None = None
    """A prompt that the model folder defines, put before every text."""
    prompt: str = ""
    """Or a prompt exactly as written."""
    dimensions: int | None = Field(default=None, ge=1)
    """Keep the first so many numbers, then bring the vector back to unit length."""
    dtype: NumberType = "float32"
    """int8: each vector scaled by its largest number, to be compared by cosine. binary, ubinary: signs, 8 a byte."""
    backend: Backend = "auto"
    """auto: torch on a GPU; on a CPU OpenVINO, where it is installed."""
    precision: Precision = "fp32"
    """bf16 and fp16 on a GPU; int8 on a CPU, of a model that was exported with `--int8`."""
    batch_tokens: int | None = Field(default=None, ge=16)
    """Padded tokens per forward. None: what suits the device."""
    bad_rows: Literal["fail", "null"] = "fail"
    """What a row without a text (empty, missing, no string, not Unicode) does: end the run before anything is embedded,
    or leave a null in place of its vector. Rows are never left out, so row i is always row i of the input."""

    @field_validator("model")
    @classmethod
    def _folder_is_absolute(cls, model: str) -> str:
        # Workers start in folders of their own, where a relative path would mean another model, or a Hub id.
        folder = Path(model).expanduser()
        return str(folder.absolute()) if folder.is_dir() else model

    @model_validator(mode="after")
    def _one_prompt(self) -> VectorConfig:
        if self.prompt and self.prompt_name:
            raise ValueError("give `prompt` or `prompt_name`, not both")
        return self


class EmbedConfig(VectorConfig):
    """How a file or data set is embedded."""

    source: SourceConfig
    """As in a recipe; also `.txt`, a text a line. `columns: {text: body}` says which column holds the texts."""
    keep: tuple[str, ...] | None = None
    """Columns of the source that go into the Parquet beside the vectors. None: all. Empty: the row's number alone."""
    cluster: ClusterConfig = ClusterConfig()
