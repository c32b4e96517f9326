"""gist-ray VERB INPUT [OUTPUT]: each verb is one function. Stdout carries the result alone; the rest goes to stderr."""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gist_ray.errors import InputError

if TYPE_CHECKING:
    from gist_ray.config import Recipe

FAILED, BAD_INPUT, INTERRUPTED = 1, 2, 130


def main(argv: list[str] | None = None) -> int:
    """Run one verb.

    Returns:
        Exit code: 0 done, 1 failed while running, 2 bad input, 130 interrupted.
    """
    if "RAY_ADDRESS" not in os.environ:
        # Ray reads its authentication mode once, at import; no verb has imported it yet. A cluster that exists already
        # has its own mode.
        os.environ.setdefault("RAY_AUTH_MODE", "token")
    arguments = _parser().parse_args(argv)
    arguments.stdout = sys.stdout  # for the one verb whose result comes before its end
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("gist_ray").setLevel(logging.DEBUG if arguments.verbose else logging.INFO)
    try:
        with contextlib.redirect_stdout(sys.stderr):  # Ray prints what workers push to the driver's stdout
            result = arguments.run(arguments)
    except InputError as error:
        return _complain(str(error), BAD_INPUT)
    except KeyboardInterrupt:
        return _complain("interrupted; run it again to continue (train: with --resume)", INTERRUPTED)
    except (FileExistsError, IsADirectoryError, NotADirectoryError, PermissionError) as error:
        return _complain(f"{error.filename}: {error.strerror}; choose another path", BAD_INPUT)
    except Exception as error:  # the last resort: one readable line, the traceback on request
        bad_input = _input_error_inside(error)
        if bad_input:
            return _complain(bad_input, BAD_INPUT)
        if arguments.verbose:
            traceback.print_exc()
        reason = (str(error).strip().splitlines() or ["no message"])[-1]
        return _complain(f"{arguments.verb} failed: {type(error).__name__}: {reason} (--verbose shows more)", FAILED)
    if result is not None:
        print(result)
    return 0


def _check(arguments: argparse.Namespace) -> str:
    from gist_ray.preflight import check

    return check(_recipe(arguments))


def _mine(arguments: argparse.Namespace) -> Path:
    from gist_ray.data.mine import mine
    from gist_ray.recipe_file import mine_config

    tree = {"source": {"path": arguments.input}, "guide": {"path": arguments.guide}}
    return mine(mine_config(tree, tuple(arguments.overrides)), arguments.output)


def _prepare(arguments: argparse.Namespace) -> Path:
    from gist_ray.data.prepare import prepare

    return prepare(_recipe(arguments))


def _train(arguments: argparse.Namespace) -> Path:
    from gist_ray.training.run import train

    return train(_recipe(arguments), resume=arguments.resume)


def _export(arguments: argparse.Namespace) -> Path:
    from gist_ray.model_folder import export

    return export(
        arguments.checkpoint, arguments.out, report=arguments.report, int8=arguments.int8, texts=arguments.texts
    )


def _evaluate(arguments: argparse.Namespace) -> Path:
    from gist_ray.config import ClusterConfig, EvaluationConfig
    from gist_ray.evaluation.run import evaluate

    recipe = _optional_recipe(arguments)
    config, cluster = (recipe.evaluation, recipe.cluster) if recipe else (EvaluationConfig(), ClusterConfig())
    chosen = {"data_workers": arguments.workers, "data_threads": arguments.threads}
    return evaluate(
        arguments.model,
        output_dir=arguments.out or _report_folder(arguments.model, arguments.precision),
        tasks=tuple(arguments.tasks) or config.tasks,
        data=arguments.data or config.data,
        baseline=arguments.baseline,
        cluster=_changed(cluster, chosen),
        batch_tokens=config.batch_tokens,
        precision=arguments.precision,
    )


def _report_folder(model: str, precision: str) -> Path:
    name = Path(model).name
    return Path("reports") / (name if precision == "fp32" else f"{name}-{precision}")


def _serve(arguments: argparse.Namespace) -> None:
    from gist_ray.config import ClusterConfig
    from gist_ray.serving.app import serve
    from gist_ray.serving_config import ServingConfig

    stdout = arguments.stdout
    recipe = _optional_recipe(arguments)
    config, cluster = (recipe.serving, recipe.cluster) if recipe else (ServingConfig(), ClusterConfig())
    names = ("host", "port", "grpc_port", "threads", "backend", "precision")
    chosen = {name: getattr(arguments, name) for name in names}
    serve(
        arguments.model,
        _changed(config, chosen),
        cluster,
        lambda endpoint: print(endpoint.url, file=stdout, flush=True),
        model_id=arguments.model_id,
    )


def _changed(section: Any, options: dict[str, Any]) -> Any:
    """A config section with the options that were given on the command line, validated again."""
    given = {name: value for name, value in options.items() if value is not None}
    return type(section)(**(section.model_dump() | given))


def _quickstart(arguments: argparse.Namespace) -> Path:
    from gist_ray.tour import quickstart

    return quickstart(arguments.out, say=lambda line: print(line, file=sys.stderr, flush=True))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="gist-ray", description="From text triplets to a served embedding model.")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")

    def verb(name: str, run: Callable[[argparse.Namespace], Any], text: str) -> argparse.ArgumentParser:
        sub = verbs.add_parser(name, help=text, description=text)
        sub.add_argument("--verbose", action="store_true", help="show the workers' output, and tracebacks")
        sub.set_defaults(run=run)
        return sub

    def overrides(sub: argparse.ArgumentParser, example: str = "train.learning_rate=2e-5") -> None:
        text = f"override one value, e.g. --set {example}; may be repeated"
        sub.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides", help=text)

    def recipe_verb(name: str, run: Callable[[argparse.Namespace], Any], text: str) -> argparse.ArgumentParser:
        sub = verb(name, run, text)
        sub.add_argument("recipe", help="YAML file, or the name of a shipped recipe")
        overrides(sub)
        return sub

    def model_verb(name: str, run: Callable[[argparse.Namespace], Any], text: str) -> argparse.ArgumentParser:
        sub = verb(name, run, text)
        sub.add_argument("model", help="model folder or Hub id")
        sub.add_argument("--recipe", help="take the settings of this recipe; options given here go first")
        overrides(sub)
        return sub

    sub = verb("quickstart", _quickstart, "the whole road on real text with a real model, in minutes")
    sub.add_argument("--out", default="gist-ray-quickstart", help="folder for everything (default: %(default)s)")

    recipe_verb("check", _check, "validate a recipe and show its arithmetic, before any machine is asked for")
    sub = verb("mine", _mine, "labelled texts, or pairs, -> triplets with the guide's help")
    sub.add_argument("input", help="file, folder, glob, bucket or hf://dataset with columns text, label or query, pos")
    sub.add_argument("output", help="new folder of triplets")
    sub.add_argument("--guide", required=True, help="model folder or Hub id of the guide")
    overrides(sub, "negatives=hard")
    recipe_verb("prepare", _prepare, "read, validate, deduplicate, tokenize, guide vectors: make the shards")
    sub = recipe_verb("train", _train, "fine-tune the student on Ray Train with DeepSpeed (prepares first if need be)")
    sub.add_argument("--resume", action="store_true", help="continue a run whose driver died")

    sub = verb("export", _export, "checkpoint -> model folder with model card")
    sub.add_argument("checkpoint", help="folder that `gist-ray train` printed")
    sub.add_argument("out", help="new model folder")
    sub.add_argument("--report", help="finished report whose scores go into the model card")
    sub.add_argument("--int8", action="store_true", help="add an int8 variant for CPUs, its accuracy measured")
    sub.add_argument("--texts", help="file of lines to calibrate it with (default: the training texts)")

    sub = model_verb("evaluate", _evaluate, "score a model with MTEB on Ray")
    sub.add_argument("--tasks", nargs="+", default=[], metavar="TASK", help="MTEB task names (data from the Hub)")
    sub.add_argument("--data", help="folder of local tasks")
    sub.add_argument("--baseline", help="an earlier report to show scores against")
    sub.add_argument("--out", help="report folder (default: reports/MODEL)")
    sub.add_argument("--workers", type=int, help="encoder actors (default: 2)")
    sub.add_argument("--threads", type=int, help="threads of each actor (default: 1)")
    sub.add_argument("--precision", choices=["fp32", "int8"], default="fp32", help="int8: the exported variant")

    sub = model_verb("serve", _serve, "serve a model folder over HTTP on this machine until interrupted")
    sub.add_argument("--host", help="address to listen on (default: 127.0.0.1)")
    sub.add_argument("--port", type=int, help="0: a free port (default: 8000)")
    sub.add_argument("--grpc-port", type=int, help="port of the gRPC route (default: there is none)")
    sub.add_argument("--threads", type=int, help="threads of the model (default: 1)")
    sub.add_argument("--backend", choices=["auto", "torch", "openvino"], help="what computes (default: auto)")
    sub.add_argument("--precision", choices=["fp32", "bf16", "fp16", "int8"], help="of the model (default: fp32)")
    sub.add_argument("--model-id", help="name under which it is served (default: the folder's name)")
    return parser


def _recipe(arguments: argparse.Namespace) -> Recipe:
    from gist_ray.recipe_file import load_recipe

    return load_recipe(arguments.recipe, tuple(arguments.overrides))


def _optional_recipe(arguments: argparse.Namespace) -> Recipe | None:
    if arguments.recipe:
        return _recipe(arguments)
    if arguments.overrides:
        raise InputError("--set changes a recipe; give one with --recipe")
    return None


def _complain(message: str, code: int) -> int:
    print(f"gist-ray: {message}", file=sys.stderr)
    return code


def _input_error_inside(error: BaseException) -> str | None:
    """The InputError that a Ray worker raised, or a pydantic error about an argument; None for real failures."""
    from pydantic import ValidationError

    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, InputError):
            # Ray makes an error that is both its own and ours; its text ends in ours.
            return str(getattr(cause, "cause", None) or cause)
        if isinstance(cause, ValidationError):
            problem = cause.errors()[0]
            return f"{'.'.join(map(str, problem['loc']))}: {problem['msg']} (got {problem['input']!r})"
        cause = cause.__cause__ or cause.__context__
    return None


if __name__ == "__main__":
    sys.exit(main())
