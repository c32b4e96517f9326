from pathlib import Path

import pytest

from gist_ray.errors import InputError
from gist_ray.manifest import differences, finished, read_manifest, write_json, write_manifest


def test_an_artifact_is_finished_when_its_manifest_is_there(tmp_path: Path):
    assert finished(tmp_path, "shards", {"a": 1}) is None
    write_manifest(tmp_path, "shards", {"a": {"b": (1, 2)}}, texts=3)
    found = finished(tmp_path, "shards", {"a": {"b": (1, 2)}})
    assert found is not None and found["texts"] == 3


def test_another_making_is_refused_and_the_field_named(tmp_path: Path):
    write_manifest(tmp_path, "shards", {"guide": {"pooling": "mean"}})
    with pytest.raises(InputError, match=r'guide\.pooling: "mean" -> "cls"'):
        finished(tmp_path, "shards", {"guide": {"pooling": "cls"}})
    with pytest.raises(InputError, match="finished shards, not report"):
        finished(tmp_path, "report", {"guide": {"pooling": "mean"}})


def test_a_damaged_manifest_is_said_so(tmp_path: Path):
    (tmp_path / "manifest.json").write_text('{"kind": ')
    with pytest.raises(InputError, match="damaged"):
        read_manifest(tmp_path)


def test_differences_name_leaves():
    assert differences({"a": 1, "b": {"c": 2}}, {"a": 1, "b": {"c": 3}, "d": 4}) == ["b.c: 2 -> 3", "d: null -> 4"]


def test_differences_look_into_lists():
    old = {"sources": [{"path": "a", "weight": 1}, {"path": "b"}]}
    assert differences(old, {"sources": [{"path": "a", "weight": 2}, {"path": "b"}]}) == ["sources[0].weight: 1 -> 2"]
    assert differences({"sources": [1]}, {"sources": [1, 2]}) == ["sources: [1] -> [1, 2]"]


def test_names_that_are_no_unicode_are_written_and_read_back(tmp_path: Path):
    write_manifest(tmp_path, "shards", {"caf\udce9.jsonl": "ünï"})
    manifest = read_manifest(tmp_path)
    assert manifest is not None and manifest["fingerprint"] == {"caf\udce9.jsonl": "ünï"}


def test_write_json_leaves_the_old_file_when_it_fails(tmp_path: Path):
    file = tmp_path / "x.json"
    write_json(file, {"a": 1})
    with pytest.raises(TypeError):
        write_json(file, {"a": object()})
    assert read_manifest(tmp_path) is None and file.read_text() == '{\n  "a": 1\n}\n'
