"""Encoder: load, tokenize, embed, save. The one model noun of guide, student, evaluation and serving."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from gist_ray.chunks import BATCH_TOKENS, SIMILAR_LENGTH, length_sorted_chunks
from gist_ray.config import ModelConfig
from gist_ray.errors import InputError
from gist_ray.layout import Pooling, model_folder, read_json, read_layout, tokenizer_digest
from gist_ray.manifest import digest_files

TokenIds = npt.NDArray[np.integer[Any]]

_LAYER_LISTS = ("encoder.layer", "transformer.layer", "encoder.layers", "layers")
_SETTINGS = {"revision", "max_tokens", "pooling"}  # of a recipe's model section


@dataclass
class Encoder:
    """A transformer with pooling and normalisation: texts in, unit vectors out.

    Vectors always have unit length, whether or not the folder has a Normalize module: every similarity of
    GISTEmbed, MTEB's and the endpoint's is a cosine.
    """

    model: Any
    tokenizer: Any
    pooling: Pooling
    max_tokens: int
    prompts: dict[str, str] = field(default_factory=dict)
    lower_case: bool = False
    source: str = ""

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        revision: str | None = None,
        max_tokens: int | None = None,
        pooling: Pooling | None = None,
        layers: Sequence[int] | None = None,
        device: str = "cpu",
        trust_remote_code: bool = False,
        weights: bool = True,
    ) -> Encoder:
        """Load a sentence-transformers folder, a bare transformers folder or a Hub id.

        Only safetensors weights are read: pickled weights can run code. `weights=False` leaves them out: such an
        encoder tokenizes and knows its `dim`, and cannot embed.

        Raises:
            InputError: no such model or layers, no safetensors, a module we do not compute, too many `max_tokens`.
        """
        folder = model_folder(path, revision)
        transformer_dir, stored = read_layout(folder)
        if not list(transformer_dir.glob("*.safetensors")):
            raise InputError(
                f"{transformer_dir} has no *.safetensors weights; gist-ray does not read pickled weights. "
                "Save the model with safe_serialization=True"
            )
        from transformers import AutoConfig, AutoTokenizer
        from transformers.utils import logging as transformers_logging

        transformers_logging.disable_progress_bar()  # a bar per load would drown the run's own progress
        shared = {"trust_remote_code": trust_remote_code, "local_files_only": True}
        try:
            config = AutoConfig.from_pretrained(transformer_dir, **shared)
            tokenizer = AutoTokenizer.from_pretrained(transformer_dir, **shared)
            model: Any = SimpleNamespace(config=config)
            if weights:
                model = _load_weights(transformer_dir, config, **shared).eval().to(device)
        except (InputError, MemoryError):  # not the folder's fault, the second
            raise
        except Exception as error:  # a folder that is wrong in its own way; transformers raises whatever it trips over
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise InputError(f"{folder} cannot be loaded as an encoder: {reason}") from error
        if layers is not None and weights:
            _keep_layers(model, layers, str(path))
        limit = _position_limit(config)
        wanted = max_tokens or stored["max_tokens"] or min(limit, tokenizer.model_max_length)
        if wanted > limit:
            raise InputError(f"max_tokens {wanted} is above the {limit} positions of {path}; lower it")
        return cls(
            model=model,
            tokenizer=tokenizer,
            pooling=pooling or stored["pooling"],
            max_tokens=int(wanted),
            prompts=stored["prompts"],
            lower_case=stored["lower_case"],
            source=str(path),
        )

    @property
    def dim(self) -> int:
        """Length of a vector."""
        return int(self.model.config.hidden_size)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        device: torch.device = next(self.model.parameters()).device
        return device

    def tokenize(self, texts: Sequence[str], *, prompt: str = "", truncate: bool = True) -> list[TokenIds]:
        """Token ids of each text, special tokens included, cut at `max_tokens`.

        `truncate=False` returns all ids, so that a caller can refuse what is too long.
        """
        if not texts:
            return []
        prepared = [(prompt + text).strip() for text in texts]
        if self.lower_case:
            prepared = [text.lower() for text in prepared]
        limit = self.max_tokens if truncate else None
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        if backend is not None:
            return self._tokenize_fast(backend, prepared, limit)
        ids = self.tokenizer(
            prepared,
            truncation=truncate,
            max_length=limit,
            padding=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )["input_ids"]
        return [np.asarray(row, dtype=np.int64) for row in ids]

    def _tokenize_fast(self, backend: Any, texts: list[str], limit: int | None) -> list[TokenIds]:
        """The same by the Rust tokenizer below: a quarter of the time for a short text, about half for many."""
        wanted = limit and {
            "max_length": limit,
            "stride": 0,
            "strategy": "longest_first",
            "direction": self.tokenizer.truncation_side,
        }
        if backend.truncation != wanted:
            backend.enable_truncation(**wanted) if wanted else backend.no_truncation()
        if backend.padding is not None:
            backend.no_padding()
        return [np.asarray(encoding.ids, dtype=np.int64) for encoding in backend.encode_batch_fast(texts)]

    def embed(self, tokens: Sequence[TokenIds], *, batch_tokens: int | None = None) -> Tensor:
        """Vectors of tokenized texts, `[n, dim]` fp32 of unit norm, in the order given.

        Texts go through the model in length-sorted chunks of at most `batch_tokens` padded tokens (a single longer
        text is a chunk of its own); None takes what suits the device. Differentiable, unless the caller forbids it.
        """
        if not tokens:
            return torch.zeros((0, self.dim), device=self.device)
        lengths = np.array([len(row) for row in tokens])
        chunks = length_sorted_chunks(lengths, batch_tokens or BATCH_TOKENS[self.device.type], similar=SIMILAR_LENGTH)
        padded = (self.padded([tokens[i] for i in chunk]) for chunk in chunks)
        vectors = torch.cat([self.forward(ids.to(self.device), mask.to(self.device)) for ids, mask in padded])
        back = np.empty(len(tokens), dtype=np.int64)
        back[np.concatenate(chunks)] = np.arange(len(tokens))
        return vectors[torch.from_numpy(back).to(vectors.device)]

    def encode(
        self, texts: Sequence[str], *, prompt: str = "", batch_tokens: int | None = None
    ) -> npt.NDArray[np.float32]:
        """Vectors of texts, `[n, dim]` float32 of unit norm."""
        with torch.inference_mode():
            vectors = self.embed(self.tokenize(texts, prompt=prompt), batch_tokens=batch_tokens)
        array: npt.NDArray[np.float32] = vectors.float().cpu().numpy()
        return array

    def save(self, folder: str | Path) -> Path:
        """Write a folder that `SentenceTransformer(folder)`, text-embeddings-inference and `Encoder.load` read."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.model.save_pretrained(folder, safe_serialization=True)
        self.tokenizer.save_pretrained(folder)
        modules = [("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize")]
        files: dict[str, Any] = {
            "sentence_bert_config.json": {"max_seq_length": self.max_tokens, "do_lower_case": self.lower_case},
            "config_sentence_transformers.json": {
                "__version__": {"sentence_transformers": "3.0.0"},  # the oldest reader of this layout
                "prompts": self.prompts,
                "default_prompt_name": None,
                "similarity_fn_name": "cosine",
            },
            "1_Pooling/config.json": {
                "word_embedding_dimension": self.dim,
                "pooling_mode_cls_token": self.pooling == "cls",
                "pooling_mode_mean_tokens": self.pooling == "mean",
                "pooling_mode_max_tokens": False,
                "pooling_mode_mean_sqrt_len_tokens": False,
            },
            "2_Normalize/config.json": {},
            # Last: a folder with it is whole.
            "modules.json": [
                {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
                for i, (path, kind) in enumerate(modules)
            ],
        }
        for name, value in files.items():
            file = folder / name
            file.parent.mkdir(exist_ok=True)
            file.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
        return folder

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Vectors `[n, dim]` of padded rows, `[n, tokens]` each, where the weights are."""
        hidden = self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return torch.nn.functional.normalize(pool(hidden, attention_mask, self.pooling), dim=-1)

    def padded(self, rows: Sequence[TokenIds]) -> tuple[Tensor, Tensor]:
        """Ids and attention mask of rows, `[len(rows), longest]` each, in main memory."""
        width = max(len(row) for row in rows)
        ids = np.full((len(rows), width), self.tokenizer.pad_token_id or 0, dtype=np.int64)
        mask = np.zeros((len(rows), width), dtype=np.int64)
        for i, row in enumerate(rows):
            ids[i, : len(row)] = row
            mask[i, : len(row)] = 1
        return torch.from_numpy(ids), torch.from_numpy(mask)


def pool(hidden: Tensor, attention_mask: Tensor, pooling: Pooling) -> Tensor:
    """`hidden [n, tokens, dim]` and `attention_mask [n, tokens]` to `[n, dim]`, in fp32 or wider."""
    hidden = widened(hidden)
    if pooling == "cls":
        return hidden[:, 0]
    weights = attention_mask.unsqueeze(-1).to(hidden.dtype)
    return (hidden * weights).sum(1) / weights.sum(1).clamp(min=1e-9)


def widened(values: Tensor) -> Tensor:
    """At least fp32: sums over tokens and cosines / temperature do not survive in bf16. fp64 stays."""
    return values if values.dtype == torch.float64 else values.float()


def fingerprint(
    path: str | Path, *, revision: str | None, max_tokens: int | None, pooling: Pooling | None, prompt: str
) -> dict[str, Any]:
    """Everything that decides an encoder's vectors: weights and tokenizer by content, then the settings.

    Raises:
        InputError: as `Encoder.load`, without loading the weights.
    """
    transformer_dir, stored = read_layout(model_folder(path, revision))
    weights = sorted(transformer_dir.glob("*.safetensors"))
    if not weights:
        raise InputError(f"{transformer_dir} has no *.safetensors weights; gist-ray does not read pickled weights")
    return {
        "weights": digest_files([transformer_dir / "config.json", *weights]),
        "tokenizer": tokenizer_digest(transformer_dir),
        "pooling": pooling or stored["pooling"],
        "positions": read_json(transformer_dir / "config.json").get("max_position_embeddings"),
        "max_tokens": max_tokens or stored["max_tokens"],
        "lower_case": stored["lower_case"],
        "prompts": stored["prompts"],
        "prompt": prompt,
    }


def load_model(model: ModelConfig, **options: Any) -> Encoder:
    """`Encoder.load` of a recipe's model section."""
    return Encoder.load(model.path, **model.model_dump(include=_SETTINGS), **options)


def model_fingerprint(model: ModelConfig) -> dict[str, Any]:
    """`fingerprint` of a recipe's model section."""
    return fingerprint(model.path, **model.model_dump(include=_SETTINGS), prompt=model.prompt)


def _load_weights(transformer_dir: Path, config: Any, **options: Any) -> Any:
    from transformers import AutoModel

    model, info = AutoModel.from_pretrained(
        transformer_dir, config=config, use_safetensors=True, dtype=torch.float32, output_loading_info=True, **options
    )
    missing = sorted(key for key in info["missing_keys"] if not key.startswith("pooler."))  # pooler: unused
    if missing:
        raise InputError(
            f"{transformer_dir} is not a whole encoder: no weights for {missing[0]} ({len(missing)} missing)"
        )
    return model


def _position_limit(config: Any) -> int:
    """Longest input: position tables of the RoBERTa family start after the padding index."""
    positions = int(getattr(config, "max_position_embeddings", 0) or 1 << 20)
    offset_by_padding = config.model_type in {"roberta", "xlm-roberta", "mpnet", "camembert"}
    return positions - (int(config.pad_token_id) + 1 if offset_by_padding else 0)


def _keep_layers(model: Any, layers: Sequence[int], name: str) -> None:
    for dotted in _LAYER_LISTS:
        owner: Any = model
        *parents, leaf = dotted.split(".")
        for parent in parents:
            owner = getattr(owner, parent, None)
        stack = getattr(owner, leaf, None)
        if isinstance(stack, torch.nn.ModuleList):
            break
    else:
        raise InputError(f"student.layers is not supported for {name}: no known list of layers in its architecture")
    if layers and layers[-1] >= len(stack):
        raise InputError(f"student.layers {list(layers)}: {name} has layers 0 to {len(stack) - 1}")
    setattr(owner, leaf, torch.nn.ModuleList([stack[i] for i in layers]))
    model.config.num_hidden_layers = len(layers)
