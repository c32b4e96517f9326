"""A model folder from elsewhere must not make us read what lies beside it, whatever its files name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings

from gist_ray.encoder import Encoder, fingerprint
from gist_ray.errors import InputError
from gist_ray.layout import model_folder
from tests.hostile_names import hostile_names
from tests.openings import openings


@pytest.fixture
def folder(tiny_model: Path, tmp_path: Path) -> Path:
    """A model, and beside it another that is whole: who follows a name out of the folder finds something to read."""
    shutil.copytree(tiny_model, tmp_path / "secret" / "model")
    shutil.copytree(tiny_model, tmp_path / "secret", dirs_exist_ok=True)
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


def changed(file: Path, **values: Any) -> None:
    known = json.loads(file.read_text()) if file.is_file() else {}
    file.write_text(json.dumps(known | values))


def named_as_transformer(folder: Path, name: str) -> None:
    (folder / "modules.json").write_text(json.dumps([{"type": "m.Transformer", "path": name}]))


def named_as_pooling(folder: Path, name: str) -> None:
    modules = [{"type": "m.Transformer", "path": ""}, {"type": "m.Pooling", "path": name}]
    (folder / "modules.json").write_text(json.dumps(modules))


def named_as_weights(folder: Path, name: str) -> None:
    from safetensors import safe_open

    weights = folder / "model.safetensors"
    if weights.is_file():
        with safe_open(weights, "np") as file:
            changed(folder / "keys.json", keys=list(file.keys()))
        weights.rename(folder / "other.safetensors")
    keys = json.loads((folder / "keys.json").read_text())["keys"]
    changed(folder / "model.safetensors.index.json", metadata={}, weight_map=dict.fromkeys(keys, name))


@pytest.mark.parametrize("named", [named_as_transformer, named_as_pooling, named_as_weights])
def test_names_that_lead_outside_are_refused_or_lead_nowhere(named: Callable[[Path, str], None], folder: Path):
    """1,200 names in all; a twentieth of them is loaded to the end, weights included."""
    seen: list[int] = []

    @settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))
    @given(name=hostile_names(folder.parent / "secret"))
    def tried(name: str) -> None:
        named(folder, name)
        with openings(folder.parent / "secret") as opened, suppress(InputError):
            fingerprint(folder, revision=None, max_tokens=None, pooling=None, prompt="")
            Encoder.load(folder, weights=len(seen) % 20 == 0)
        seen.append(len(opened))
        assert not opened, (name, opened)

    tried()
    assert len(seen) >= 400


@pytest.mark.parametrize("named", [named_as_transformer, named_as_pooling, named_as_weights])
@pytest.mark.parametrize("name", ["../secret", "{beside}", "../secret/model.safetensors", "a/../../secret"])
def test_the_message_says_what_was_named(named: Callable[[Path, str], None], name: str, folder: Path):
    named(folder, name.format(beside=folder.parent / "secret"))
    with pytest.raises(InputError, match="not inside it"):
        Encoder.load(folder)


@pytest.mark.parametrize("key", ["vocab_file", "tokenizer_file", "special_tokens_map_file", "chat_template_file"])
@pytest.mark.parametrize("fast", [True, False])
def test_a_tokenizers_settings_name_nothing_outside(key: str, fast: bool, folder: Path):
    """transformers keeps them inside; real models name files of the machine that they were made on, so no refusal."""
    changed(folder / "tokenizer_config.json", **{key: str(folder.parent / "secret/tokenizer.json")})
    if not fast:
        (folder / "tokenizer.json").unlink()
    with openings(folder.parent / "secret") as opened, suppress(InputError):
        Encoder.load(folder)
    assert not opened


def test_an_adapter_is_not_followed_to_its_model(folder: Path):
    changed(folder / "adapter_config.json", base_model_name_or_path=str(folder.parent / "secret"), peft_type="LORA")
    shutil.copy(folder / "model.safetensors", folder / "adapter_model.safetensors")
    with openings(folder.parent / "secret") as opened, pytest.raises(InputError, match="merge it into that model"):
        Encoder.load(folder)
    assert not opened


def test_the_watch_sees_what_is_opened(folder: Path):
    with openings(folder.parent / "secret") as opened:
        Encoder.load(folder.parent / "secret")
    assert {"model.safetensors", "tokenizer.json", "config.json"} <= set(opened)


WRONG = ["[]", "3", '[{"type": 3}]', '{"a": 1}', "[" * 100_000, "[3]", "null", '{"prompts": [3]}']
FINE = {("modules.json", "[]"), ("config_sentence_transformers.json", '{"a": 1}')}


@pytest.mark.parametrize("content", WRONG)
@pytest.mark.parametrize("file", ["modules.json", "config.json", "config_sentence_transformers.json", "tokenizer.json"])
def test_files_of_a_wrong_shape_are_named(file: str, content: str, folder: Path):
    (folder / file).write_text(content)
    if (file, content) in FINE:
        Encoder.load(folder)
        return
    with pytest.raises(InputError) as caught:
        Encoder.load(folder)
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize("name", ["../secret/", "org/name\n", "org/../name", "a/b/c", "-a/b", "org/ name", "\0", ""])
def test_what_is_neither_a_folder_nor_an_id_is_refused(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(folder)
    (folder.parent / "secret").rename(folder.parent / "moved")
    with pytest.raises(InputError, match="neither an existing folder nor a Hub id"):
        model_folder(name, None)
