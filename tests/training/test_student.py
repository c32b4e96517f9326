"""The student as it is trained, for every family of encoders at hand: tiny models with random weights, real classes."""

import itertools
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor, nn

from gist_ray.config import Recipe
from gist_ray.encoder import Encoder
from gist_ray.errors import InputError
from gist_ray.recipe_file import parse_recipe
from gist_ray.training.dropout import CpuDropout
from gist_ray.training.student import checkpoint_blocks, load_student, merged_student, set_dropout

SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 80,
}
FAMILIES = {
    "Bert": SIZES,
    "MPNet": SIZES,
    "Roberta": SIZES,
    "ModernBert": SIZES | {"pad_token_id": 0, "cls_token_id": 101, "sep_token_id": 102, "attention_dropout": 0.1},
    "DistilBert": {"dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 48, "max_position_embeddings": 80},
    "Albert": SIZES | {"embedding_size": 16, "num_hidden_groups": 2},
    "Electra": SIZES | {"embedding_size": 16},
}
TEXTS = ["a", "The cat sits outside, and the plane is taking off.", "naïve café", "A man is playing a guitar."] * 3
LORA = {"rank": 2, "alpha": 6}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Models this small only wait for a second one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def folders(minilm: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model folder of each family."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(minilm)
    made = {}
    for family, sizes in FAMILIES.items():
        torch.manual_seed(len(family))
        config = getattr(transformers, f"{family}Config")(vocab_size=len(tokenizer), **sizes)
        model = transformers.AutoModel.from_config(config).eval()
        made[family] = Encoder(model, tokenizer, "mean", 64).save(tmp_path_factory.mktemp("families") / family)
    return made


every_family = pytest.mark.parametrize("family", FAMILIES)


def recipe(folder: Path, **train) -> Recipe:
    return parse_recipe(
        {
            "name": "r",
            "data": {"sources": [{"path": "a.jsonl"}]},
            "student": {"path": str(folder)},
            "guide": {"path": str(folder)},
            "train": train,
        }
    )


def student(folder: Path, **train) -> Encoder:
    return load_student(recipe(folder, **train), "cpu")


def vectors_and_gradients(encoder: Encoder, *, texts: list[str] = TEXTS) -> tuple[Tensor, dict[str, Tensor | None]]:
    """What a step sees: the same dropout each time, one backward pass."""
    encoder.model.zero_grad()
    torch.manual_seed(11)
    vectors = encoder.embed(encoder.tokenize(texts), batch_tokens=40)
    (vectors * torch.linspace(-1, 1, vectors.numel()).view_as(vectors)).sum().backward()
    return vectors.detach(), {name: p.grad for name, p in encoder.model.named_parameters()}


def calls_of_first_block(encoder: Encoder) -> list[int]:
    """Grows with every computation of a linear layer of the first block."""
    seen: list[int] = []
    first = next(m for stack in encoder.model.modules() if isinstance(stack, nn.ModuleList) for m in stack.modules())
    next(m for m in first.modules() if isinstance(m, nn.Linear)).register_forward_hook(lambda *_: seen.append(1))
    return seen


def shift_adapters(encoder: Encoder):
    """As training does: adapters begin as zero, and would hide any mistake in merging."""
    torch.manual_seed(3)
    for name, parameter in encoder.model.named_parameters():
        if ".lora_" in name:
            parameter.data += torch.randn_like(parameter) / 4


@every_family
def test_what_requires_a_gradient_gets_one_and_nothing_else_is_left(folders: dict[str, Path], family: str):
    encoder = student(folders[family])
    assert encoder.model.training
    _, gradients = vectors_and_gradients(encoder)
    without = {name for name, gradient in gradients.items() if gradient is None}
    assert without == {name for name, p in encoder.model.named_parameters() if not p.requires_grad}
    assert {name.partition(".")[0] for name in without} <= {"pooler"}
    assert bool(without) == (family in {"Bert", "MPNet", "Roberta", "Albert"})


@every_family
@pytest.mark.parametrize("lora", [None, LORA], ids=["all", "lora"])
def test_checkpointed_activations_change_nothing_but_memory(folders: dict[str, Path], family: str, lora: dict | None):
    plain, checkpointed = (
        student(folders[family], dropout=0.2, lora=lora, activation_checkpointing=on) for on in (False, True)
    )
    for encoder in (plain, checkpointed):
        shift_adapters(encoder)
    once, twice = calls_of_first_block(plain), calls_of_first_block(checkpointed)
    expected, gradients = vectors_and_gradients(plain)
    vectors, found = vectors_and_gradients(checkpointed)
    assert len(twice) == 2 * len(once) > 0
    assert torch.equal(vectors, expected)  # dropout included
    for name, gradient in gradients.items():
        same = found[name] is None if gradient is None else torch.equal(found[name], gradient)
        assert same, name
    assert sum(gradient is not None for gradient in gradients.values()) > 5
    with torch.no_grad():  # GradCache's first pass
        torch.manual_seed(11)
        again = checkpointed.embed(checkpointed.tokenize(TEXTS), batch_tokens=40)
    assert torch.equal(again, expected)


@every_family
def test_merged_adapters_are_an_ordinary_folder(folders: dict[str, Path], family: str, tmp_path: Path):
    from sentence_transformers import SentenceTransformer

    encoder = student(folders[family], lora=LORA, activation_checkpointing=True)
    shift_adapters(encoder)
    before = {name: value.clone() for name, value in encoder.model.state_dict().items()}
    merged = merged_student(encoder)
    merged.save(tmp_path / "merged")

    assert encoder.model.training and not merged.model.training
    after = encoder.model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)

    expected = encoder.model.eval() and encoder.encode(TEXTS)
    plain = Encoder.load(folders[family])
    assert np.abs(expected - plain.encode(TEXTS)).max() > 1e-2  # the adapters matter
    assert merged.model.state_dict().keys() == plain.model.state_dict().keys()
    np.testing.assert_allclose(merged.encode(TEXTS), expected, atol=1e-5)
    np.testing.assert_allclose(Encoder.load(tmp_path / "merged").encode(TEXTS), expected, atol=1e-5)
    np.testing.assert_allclose(SentenceTransformer(str(tmp_path / "merged")).encode(TEXTS), expected, atol=1e-5)
    assert sorted(file.name for file in (tmp_path / "merged").iterdir()) == sorted(
        file.name for file in folders[family].iterdir()
    )


def test_merging_copies_what_is_adapted_and_nothing_else(folders: dict[str, Path]):
    encoder = student(folders["Bert"], lora=LORA | {"target_modules": ["query"]})
    parameters = dict(encoder.model.named_parameters())
    copied = {
        name
        for name, p in merged_student(encoder).model.named_parameters()
        if p.data_ptr() not in {own.data_ptr() for own in parameters.values()}
    }
    assert copied == {f"encoder.layer.{layer}.attention.self.query.weight" for layer in range(3)}
    plain = student(folders["Bert"])
    assert merged_student(plain) is plain


@every_family
def test_adapters_go_on_every_linear_layer_of_the_blocks(folders: dict[str, Path], family: str):
    encoder = student(folders[family], lora=LORA, dropout=0.3)
    trained = {name for name, p in encoder.model.named_parameters() if p.requires_grad}
    adapted = {name.partition(".lora_")[0] for name in trained}
    linear = {
        name.removesuffix(".base_layer")
        for name, module in encoder.model.named_modules()
        if isinstance(module, nn.Linear) and ".lora_" not in name
    }
    # Beside the blocks: poolers, and what widens or shortens the embeddings.
    assert linear - adapted <= {"pooler", "pooler.dense", "encoder.embedding_hidden_mapping_in", "embeddings_project"}
    assert adapted <= linear and all(".lora_" in name for name in trained)
    _, gradients = vectors_and_gradients(encoder)
    assert {name for name, gradient in gradients.items() if gradient is not None} == trained


def test_adapters_begin_alike_on_every_worker_and_leave_the_random_state_alone(folders: dict[str, Path]):
    def adapters(seed: int) -> Tensor:
        encoder = student(folders["Bert"], lora=LORA, seed=seed)
        assert np.array_equal(encoder.model.eval() and encoder.encode(TEXTS), plain)  # at first they add nothing
        return torch.cat([p.flatten() for p in encoder.model.parameters() if p.requires_grad])

    plain = Encoder.load(folders["Bert"]).encode(TEXTS)
    torch.manual_seed(1)
    first, state = adapters(5), torch.get_rng_state()
    torch.manual_seed(2)
    assert torch.equal(adapters(5), first) and not torch.equal(adapters(6), first)
    torch.manual_seed(1)
    assert torch.equal(torch.get_rng_state(), state)


def test_rank_alpha_dropout_and_targets_are_those_of_the_recipe(folders: dict[str, Path]):
    lora = {"rank": 3, "alpha": 1.5, "dropout": 0.4, "target_modules": ["attention.self.value", "intermediate.dense"]}
    encoder = student(folders["Bert"], lora=lora, dropout=0.1)
    adapted = {name: m for name, m in encoder.model.named_modules() if hasattr(m, "get_delta_weight")}
    assert {name.split(".", 3)[3] for name in adapted} == {"attention.self.value", "intermediate.dense"}
    assert len(adapted) == 6
    for layer in adapted.values():
        assert layer.lora_A["default"].weight.shape[0] == 3 and layer.scaling["default"] == 0.5
        assert layer.lora_dropout["default"].p == 0.4  # not the model's


@pytest.mark.parametrize("name", ["uery", "q_proj", "word_embeddings", "LayerNorm", "pooler.dense"])
def test_unknown_targets_are_named_with_the_valid_ones(folders: dict[str, Path], name: str):
    with pytest.raises(InputError, match=rf"\['{name}'\].*BertModel.*dense, key, query, value, encoder\.layer\.0"):
        student(folders["Bert"], lora=LORA | {"target_modules": ["query", name]})


def test_without_peft_the_remedy_is_named(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(InputError, match=r'pip install "gist-ray\[lora\]"'):
        student(folders["Bert"], lora=LORA)


@every_family
def test_dropout_is_the_folders_or_the_recipes(folders: dict[str, Path], family: str):
    def repeats(encoder: Encoder) -> bool:
        with torch.no_grad():
            return torch.equal(*(encoder.embed(encoder.tokenize(TEXTS)) for _ in range(2)))

    assert not repeats(student(folders[family], dropout=0.3)) and repeats(student(folders[family], dropout=0.0))
    stored, unchanged = Encoder.load(folders[family]).model, student(folders[family]).model
    for theirs, ours in zip(stored.modules(), unchanged.modules(), strict=True):
        assert getattr(theirs, "p", None) == getattr(ours, "p", None)


def test_random_numbers_are_cheap_unless_the_compiler_makes_them(folders: dict[str, Path]):
    def kinds(**settings: bool) -> set[type]:
        return {type(m) for m in student(folders["Bert"], **settings).model.modules() if isinstance(m, nn.Dropout)}

    assert kinds() == {CpuDropout} and kinds(compile=True) == {nn.Dropout}


def test_dropout_kept_as_a_number_is_set_too(folders: dict[str, Path]):
    model = Encoder.load(folders["ModernBert"]).model
    set_dropout(model, 0.3)
    assert {block.attn.attention_dropout for block in model.layers} == {0.3}
    set_dropout(model, None)
    assert {block.attn.attention_dropout for block in model.layers} == {0.3}
    assert {m.p for m in model.modules() if isinstance(m, nn.Dropout)} == {0.3}


def test_not_for_training_means_the_same_parameters_and_nothing_else(folders: dict[str, Path]):
    settings = {"lora": LORA, "activation_checkpointing": True, "compile": True}
    plain = load_student(recipe(folders["Bert"], **settings), "cpu", training=False)
    ours = student(folders["Bert"], **settings)
    assert plain.model.state_dict().keys() == ours.model.state_dict().keys()
    assert not plain.model.training and ours.model.training
    assert all("forward" not in vars(block) for block in plain.model.encoder.layer)
    assert all("forward" in vars(block) for block in ours.model.encoder.layer)


def test_a_model_without_blocks_is_refused():
    with pytest.raises(InputError, match=r"train\.activation_checkpointing is not supported for Linear"):
        checkpoint_blocks(nn.Linear(2, 2))


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch):
    """torch.compile without the compiler: the tracing is what may fail or repeat, and takes no time."""
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    torch._dynamo.utils.counters.clear()
    yield torch._dynamo.utils.counters
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("lora", "checkpointing"),
    [
        (None, False),
        (LORA, True),
        pytest.param(LORA, False, marks=pytest.mark.slow),
        pytest.param(None, True, marks=pytest.mark.slow),
    ],
)
def test_compiled_blocks_compute_the_same(folders: dict[str, Path], traced, lora: dict | None, checkpointing: bool):
    settings = {"dropout": 0.0, "lora": lora, "activation_checkpointing": checkpointing}
    plain, compiled = (student(folders["Bert"], compile=on, **settings) for on in (False, True))
    for encoder in (plain, compiled):
        shift_adapters(encoder)
    expected, gradients = vectors_and_gradients(plain)
    vectors, found = vectors_and_gradients(compiled)
    torch.testing.assert_close(vectors, expected, atol=1e-6, rtol=0)
    for name, gradient in gradients.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-6, rtol=1e-4)
    assert found.keys() == gradients.keys() and compiled.model.state_dict().keys() == plain.model.state_dict().keys()
    assert 0 < traced["stats"]["unique_graphs"] and not traced["graph_break"]


@pytest.mark.slow
def test_shapes_do_not_compile_again(folders: dict[str, Path], traced):
    encoder = student(folders["Bert"], compile=True)
    rng = np.random.default_rng(0)

    def passes(modes: tuple[bool, ...], rows: range, padded: bool):
        for training, count, width in itertools.product(modes, rows, (5, 17, 31)):
            encoder.model.train(training)
            batch = [rng.integers(1000, 2000, width) for _ in range(count)]
            batch[-1] = batch[-1][: width - 2 * padded]
            encoder.embed(batch, batch_tokens=10_000).sum().backward()
            with torch.no_grad():
                encoder.embed(batch, batch_tokens=10_000)

    passes((True,), range(2, 3), padded=True)
    once = traced["stats"]["unique_graphs"]
    passes((True,), range(3, 9), padded=True)
    assert traced["stats"]["unique_graphs"] == once == 2  # with and without gradient, for all blocks and shapes
    passes((True, False), range(1, 4), padded=False)
    passes((False,), range(2, 4), padded=True)
    assert 8 < traced["stats"]["unique_graphs"] <= 16  # beyond 8, torch would run the rest uncompiled by default
    assert not traced["graph_break"]


def test_a_missing_compiler_is_said_before_the_first_step(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(InputError, match="C\\+\\+ compiler on the CPU, and no-such-compiler is not found"):
        student(folders["Bert"], compile=True)


@pytest.mark.slow
def test_the_real_compiler_agrees_and_replays_dropout(folders: dict[str, Path], tmp_path: Path):
    torch._dynamo.reset()
    plain, compiled = (student(folders["Bert"], compile=on, dropout=0.0) for on in (False, True))
    expected, gradients = vectors_and_gradients(plain)
    vectors, found = vectors_and_gradients(compiled)
    torch.testing.assert_close(vectors, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(found, gradients, atol=1e-5, rtol=1e-3)
    compiled.save(tmp_path)
    np.testing.assert_array_equal(Encoder.load(tmp_path).encode(TEXTS), Encoder.load(folders["Bert"]).encode(TEXTS))

    dropped = student(folders["Bert"], compile=True, dropout=0.2)
    first, _ = vectors_and_gradients(dropped)
    again, _ = vectors_and_gradients(dropped)
    with torch.no_grad():  # GradCache's first pass
        torch.manual_seed(11)
        cached = dropped.embed(dropped.tokenize(TEXTS), batch_tokens=40)
    assert torch.equal(first, again) and torch.allclose(first, cached, atol=1e-6)
    assert (first - expected).abs().max() > 1e-2
