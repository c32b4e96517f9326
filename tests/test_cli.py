"""The command line as a user meets it: exit codes, one readable message, nothing but the result on stdout."""

import json
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from gist_ray.cli import main


@pytest.fixture
def recipe_file(tmp_path: Path, tiny_model: Path) -> Path:
    (tmp_path / "a.jsonl").write_text(json.dumps({"query": "q", "pos": "p", "neg": "n"}) + "\n")
    recipe = {
        "name": "r",
        "output_dir": str(tmp_path / "runs"),
        "data": {"sources": [{"path": str(tmp_path / "a.jsonl")}]},
        "student": {"path": str(tiny_model)},
        "guide": {"path": str(tiny_model)},
    }
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe))
    return tmp_path / "r.yaml"


def test_check_prints_the_resolved_recipe(recipe_file: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["check", str(recipe_file), "--set", "train.batch_size=64", "--set", "cluster.num_workers=2"]) == 0
    resolved = yaml.safe_load(capsys.readouterr().out)
    assert resolved["recipe"]["train"]["batch_size"] == 64
    assert resolved["derived"]["batch"] == {
        "triplets_per_step": 64,
        "triplets_per_worker": 32,
        "candidates_per_query": 63 + 64 + 63 + 63,
    }
    assert resolved["derived"]["student"]["dim"] == 32
    assert resolved["derived"]["deepspeed"]["zero_optimization"]["stage"] == 0
    memory = resolved["derived"]["memory_mb_per_worker"]
    assert memory["adam_moments"] == pytest.approx(2 * memory["weights"], abs=0.1)  # two moments, nothing divided


def test_check_divides_the_moments_by_the_workers_where_zero_does(
    recipe_file: Path, capsys: pytest.CaptureFixture[str]
):
    assert main(["check", str(recipe_file), "--set", "train.zero_stage=1", "--set", "cluster.num_workers=2"]) == 0
    memory = yaml.safe_load(capsys.readouterr().out)["derived"]["memory_mb_per_worker"]
    assert memory["adam_moments"] == pytest.approx(memory["weights"], abs=0.1)


def test_the_shipped_command_is_installed():
    run = subprocess.run(
        ["gist-ray", "--help"],
        capture_output=True,
        text=True,
        check=True,
        env={"PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin"},
    )
    for verb in ("quickstart", "mine", "check", "prepare", "train", "export", "evaluate", "compare", "embed", "serve"):
        assert verb in run.stdout


BAD_INPUT = [
    (["check", "{dir}/missing.yaml"], "does not exist"),
    (["check", "{recipe}", "--set", "train.lr=1"], "unknown key `train.lr`"),
    (["check", "{recipe}", "--set", "data.sources=[{{path: {dir}/none.jsonl}}]"], "none.jsonl does not exist"),
    (["prepare", "{recipe}", "--set", "data.sources=[{{path: {dir}/wrong.jsonl}}]"], "no column `query`"),
    (["train", "{recipe}", "--set", "data.sources=[{{path: {dir}/empty.jsonl}}]"], "empty.jsonl is empty"),
    (["check", "{recipe}", "--set", "student.path={dir}/no-weights"], "config.json is missing"),
    (
        ["prepare", "{recipe}", "--set", "data.sources=[{{path: {dir}/a.jsonl, columns: {{query: questoin}}}}]"],
        "questoin",
    ),
    (["prepare", "{recipe}", "--set", "data.sources=[{{path: {dir}/a.jsonl, tasks: '('}}]"], "regular expression"),
    (["mine", "{dir}/none.jsonl", "{dir}/mined", "--guide", "{model}"], "none.jsonl does not exist"),
    (["mine", "{dir}/empty.jsonl", "{dir}/mined", "--guide", "{model}"], "empty.jsonl is empty"),
    (["mine", "{dir}/a.jsonl", "{dir}/mined", "--guide", "{dir}/no-weights"], "config.json is missing"),
    (["mine", "{dir}/a.jsonl", "{dir}/mined", "--guide", "{model}", "--set", "topk=5"], "did you mean `top_k`"),
    (["mine", "{dir}/a.jsonl", "{dir}/mined", "--guide", "{model}", "--set", "top_k=0"], "top_k"),
    (["mine", "{dir}/a.jsonl", "{dir}/a.jsonl", "--guide", "{model}"], "a.jsonl"),
    (["export", "{dir}", "{dir}/out"], "not a finished checkpoint"),
    (["evaluate", "{dir}/no-weights", "--data", "{dir}"], "config.json is missing"),
    (["serve", "{dir}/no-weights"], "config.json is missing"),
    (["serve", "no/such/path/at/all"], "neither an existing folder nor a Hub id"),
    (["serve", "{model}", "--port", "{port}"], "is in use"),
    (["serve", "{model}", "--port", "70000"], "port"),
    (["serve", "{model}", "--recipe", "{recipe}", "--set", "serving.port={port}"], "is in use"),
    (["serve", "{model}", "--set", "serving.port=1"], "give one with --recipe"),
    (["embed", "{model}", "{dir}/none.jsonl"], "none.jsonl does not exist"),
    (["embed", "{model}", "{dir}/empty.jsonl"], "empty.jsonl is empty"),
    (["embed", "{model}", "{dir}/a.jsonl"], "has no column `text`; it has query, pos, neg. Say where"),
    (["embed", "{model}", "{dir}/wrong.jsonl", "--column", "txt"], "--column text"),
    (["embed", "{dir}/no-weights", "{dir}/wrong.jsonl"], "config.json is missing"),
    (["embed", "{dir}/no-weights"], "config.json is missing"),
    (["embed", "{model}", "--out", "x.npy"], "--out is for files"),
    (["embed", "{model}", "{dir}/wrong.jsonl", "--prompt-name", "query"], "no prompt named query"),
    (["embed", "{model}", "--dimensions", "0"], "dimensions"),
    (["embed", "{model}", "--set", "batch_token=64"], "did you mean `batch_tokens`"),
    (["embed", "{model}", "{dir}/wrong.jsonl", "--format", "raw"], "--format is for lines"),
    (["embed", "{model}", "{dir}/*.jsonl", "--column", "text"], "name the output with --out"),
    (["embed", "{model}", "{dir}/wrong.jsonl", "--set", "sorce.max_rows=1"], "did you mean `source`"),
    (["embed", "{model}", "hf://no/such"], "needs `revision: <commit>`"),
    (["evaluate", "{model}"], "nothing to evaluate on"),
    (["evaluate", "{model}", "--benchmark", "MTEB(en)"], "no benchmark 'MTEB(en)' not found. Did you mean"),
    (["compare", "{dir}", "{dir}"], "is no report: report.json cannot be read"),
    (["evaluate", "{model}", "--recipe", "{recipe}", "--set", "evaluation.data={dir}/none"], "none does not exist"),
    (
        [
            "prepare",
            "{recipe}",
            "--set",
            "data.sources=[{{path: 'hf://no/such', revision: 0123456789012345678901234567890123456789}}]",
        ],
        "from the Hub",
    ),
]


@pytest.mark.parametrize(("arguments", "message"), BAD_INPUT)
def test_bad_input_is_one_message_and_exit_code_2(
    recipe_file: Path, tiny_model: Path, arguments, message, capsys: pytest.CaptureFixture[str]
):
    folder = recipe_file.parent
    (folder / "wrong.jsonl").write_text('{"text": "t", "label": 1}\n')
    (folder / "empty.jsonl").write_text("")
    (folder / "no-weights").mkdir()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        values = {"dir": folder, "recipe": recipe_file, "model": tiny_model, "port": taken.getsockname()[1]}
        assert main([argument.format(**values) for argument in arguments]) == 2
    out, err = capsys.readouterr()
    assert out == "" and message in err and "Traceback" not in err
    assert [line for line in err.splitlines() if line.startswith("gist-ray: ")] and len(err.splitlines()) <= 3


def test_a_non_string_cell_is_a_counted_reject_in_a_readable_message(
    recipe_file: Path, capsys: pytest.CaptureFixture[str], ray_session
):
    (recipe_file.parent / "a.jsonl").write_text('{"query": 3, "pos": "p"}\n')
    assert main(["prepare", str(recipe_file)]) == 2
    err = capsys.readouterr().err
    assert "query is not a string (int): 1 rows" in err and "Traceback" not in err


def test_embed_prints_the_output_and_nothing_else(
    recipe_file: Path,
    tiny_model: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    ray_session,
):
    out = recipe_file.parent / "out" / "vectors.npy"
    options = ["--column", "query", "--out", str(out), "--dimensions", "8", "--workers", "1", "--backend", "torch"]
    assert main(["embed", str(tiny_model), str(recipe_file.parent / "a.jsonl"), *options]) == 0
    assert capsys.readouterr().out == f"{out}\n" and np.load(out).shape == (1, 8)
    assert "1 rows, 1 distinct texts" in caplog.text


def test_a_failure_while_running_is_exit_code_1(
    recipe_file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    import gist_ray.preflight

    def broken(recipe):
        raise RuntimeError("first line\nthe disk is on fire")

    monkeypatch.setattr(gist_ray.preflight, "check", broken)
    assert main(["check", str(recipe_file)]) == 1
    assert "check failed: RuntimeError: the disk is on fire" in capsys.readouterr().err


def test_importing_the_package_does_nothing():
    code = (
        "import sys, gist_ray, gist_ray.cli; print([m for m in ('torch', 'ray', 'transformers') if m in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
