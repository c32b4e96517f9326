"""Layout: where the parts of a model folder lie, and what it says of itself. Nothing outside the folder is read."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, Literal

from gist_ray.errors import InputError
from gist_ray.manifest import digest_files, digest_of

Pooling = Literal["mean", "cls"]

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_HUB_FILES = ["*.json", "*.txt", "*.model", "*.safetensors"]
_POOLING_MODES = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls"}


def model_folder(path: str | Path, revision: str | None) -> Path:
    """A local folder: the one given, or the snapshot of a Hub id.

    Raises:
        InputError: neither, or the Hub does not give it.
    """
    folder, name = Path(path).expanduser(), str(path)
    if name and folder.is_dir():
        return folder.absolute()
    if not _HUB_ID.fullmatch(name):
        raise InputError(f"model {name} is neither an existing folder nor a Hub id like org/name")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=_HUB_FILES))
    except Exception as error:  # the hub client raises a dozen unrelated types; each means "not to be had"
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"model {name} is no local folder and cannot be had from the Hub ({reason}); "
            "give the path of a model folder, or check the id, the revision and the network"
        ) from error


def read_layout(folder: Path) -> tuple[Path, dict[str, Any]]:
    """Transformer folder and stored settings of a sentence-transformers or bare transformers folder.

    Raises:
        InputError: no model folder, a module we do not compute, or a name that leads out of the folder.
    """
    stored: dict[str, Any] = {"pooling": "mean", "max_tokens": None, "lower_case": False, "prompts": {}}
    transformer_dir = folder
    if (folder / "modules.json").is_file():
        for module in _modules(folder / "modules.json"):
            kind, place = module["type"].rsplit(".", 1)[-1], _inside(folder, module["path"])
            if kind == "Transformer":
                transformer_dir = place
            elif kind == "Pooling":
                stored["pooling"] = _stored_pooling(place / "config.json")
            elif kind != "Normalize":
                raise InputError(f"{folder}: module {kind} is not supported; Transformer, Pooling and Normalize are")
        prompts = read_json(folder / "config_sentence_transformers.json", {}).get("prompts") or {}
        if not isinstance(prompts, dict):
            raise InputError(
                f"{folder / 'config_sentence_transformers.json'}: prompts are no object of names and texts"
            )
        stored["prompts"] = {key: value for key, value in prompts.items() if value}
        settings = read_json(transformer_dir / "sentence_bert_config.json", {})
        stored["max_tokens"] = settings.get("max_seq_length")
        stored["lower_case"] = bool(settings.get("do_lower_case", False))
    if not (transformer_dir / "config.json").is_file():
        raise InputError(f"{folder} is not a model folder: {transformer_dir / 'config.json'} is missing")
    _check_names(transformer_dir)
    return transformer_dir, stored


def _modules(file: Path) -> list[dict[str, str]]:
    modules = _parsed(file)
    for module in modules if isinstance(modules, list) else [modules]:
        if not isinstance(module, dict) or not all(isinstance(module.get(key), str) for key in ("type", "path")):
            raise InputError(f"{file} is no list of modules, each with a type and a path")
    return list(modules)


def _inside(folder: Path, name: str) -> Path:
    """What a file of a model folder names; a folder from elsewhere must not make us read what lies beside it."""
    if Path(name).is_absolute() or ".." in Path(name).parts or "\0" in name:
        raise InputError(
            f"{folder} names {name!r}, which is not inside it; gist-ray reads nothing outside a model's folder"
        )
    return folder / name


def _check_names(transformer_dir: Path) -> None:
    """Of what transformers would follow out of the folder: weights in parts, and the model below an adapter.

    The other names in such a folder it keeps inside itself (seen in 5.24; `tests/test_layout.py`).
    """
    if (transformer_dir / "adapter_config.json").is_file():
        raise InputError(f"{transformer_dir} holds an adapter for another model; merge it into that model first")
    names = read_json(transformer_dir / "model.safetensors.index.json", {}).get("weight_map", {})
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise InputError(f"{transformer_dir / 'model.safetensors.index.json'} has no map of weights to file names")
    for name in set(names.values()):
        _inside(transformer_dir, name)


def tokenizer_digest(transformer_dir: Path) -> str:
    """Content hash of the tokenizer files of a transformers folder."""
    names = ("tokenizer.json", "vocab.txt", "vocab.json", "merges.txt", "tokenizer.model", "sentencepiece.bpe.model")
    files = [transformer_dir / name for name in names if (transformer_dir / name).is_file()]
    # With tokenizer.json the vocabulary files do not count; lower-casing and limits stand in the settings always.
    files = files[:1] if files and files[0].name == "tokenizer.json" else files
    settings = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
    files += [transformer_dir / name for name in settings if (transformer_dir / name).is_file()]
    return digest_of([digest_files([file]) for file in files])


def _stored_pooling(file: Path) -> Pooling:
    config = read_json(file)
    modes = [name for key, name in _POOLING_MODES.items() if config.get(key)]
    others = [key for key, on in config.items() if key.startswith("pooling_mode_") and on and key not in _POOLING_MODES]
    if isinstance(config.get("pooling_mode"), str):  # sentence-transformers >= 6
        modes, others = [config["pooling_mode"]], []
    if others or len(modes) != 1 or modes[0] not in ("mean", "cls"):
        raise InputError(f"{file}: pooling {others + modes} is not supported; mean and cls are")
    return "mean" if modes[0] == "mean" else "cls"


def read_json(file: Path, default: dict[str, Any] | None = None) -> dict[str, Any]:
    """A file's object; of a file that is absent, the default, if there is one.

    Raises:
        InputError: no JSON, or no object.
    """
    if not file.is_file() and default is not None:
        return default
    found = _parsed(file)
    if not isinstance(found, dict):
        raise InputError(f"{file} holds no JSON object")
    return found


def _parsed(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{file} cannot be read as JSON: {error}") from error
