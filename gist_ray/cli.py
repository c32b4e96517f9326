"""gist-ray VERB INPUT [OUTPUT]: each verb is one function. Stdout carries the result alone; the rest goes to stderr."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gist_ray.errors import InputError
from gist_ray.log_lines import name_run, start_lines

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
    start_lines(arguments.verb, verbose=arguments.verbose)
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
    from gist_ray.mine_config import MineConfig
    from gist_ray.recipe_file import parsed_settings

    tree = {"source": {"path": arguments.input}, "guide": {"path": arguments.guide}}
    return mine(parsed_settings(MineConfig, tree, "mine", tuple(arguments.overrides)), arguments.output)


def _prepare(arguments: argparse.Namespace) -> Path:
    from gist_ray.data.prepare import prepare

    return prepare(_recipe(arguments))


def _train(arguments: argparse.Namespace) -> Path:
    from gist_ray.training.run import train

    return train(_recipe(arguments), resume=arguments.resume)


def _export(arguments: argparse.Namespace) -> Path:
    from gist_ray.model_folder import export

    return export(
        arguments.checkpoint,
        arguments.out,
        report=arguments.report,
        int8=arguments.int8,
        texts=arguments.texts,
        start_share=arguments.start_share,
    )


def _evaluate(arguments: argparse.Namespace) -> str:
    from gist_ray.cluster import connected
    from gist_ray.config import ClusterConfig, EvaluationConfig
    from gist_ray.evaluation.run import evaluate

    recipe = _optional_recipe(arguments)
    config, cluster = (recipe.evaluation, recipe.cluster) if recipe else (EvaluationConfig(), ClusterConfig())
    chosen = {"data_workers": arguments.workers, "data_threads": arguments.threads}
    cluster = _changed(cluster, chosen)
    config = _changed(config, {"cache_gb": arguments.cache_gb, "retries": arguments.retries})
    models = arguments.model + ([arguments.endpoint] if arguments.endpoint else [])
    if not models:
        raise InputError("nothing to evaluate: give a model, or the URL of a served one with --endpoint")
    several = len(models) > 1
    reports = []
    with connected(cluster) if several else contextlib.nullcontext():
        for model in models:
            folder = _report_folder(model, arguments.precision, Path(arguments.out or "reports"))
            report = evaluate(
                model,
                output_dir=folder if several or not arguments.out else arguments.out,
                tasks=tuple(arguments.tasks) or config.tasks,
                benchmark=arguments.benchmark or config.benchmark,
                data=arguments.data or config.data,
                baseline=arguments.baseline,
                cluster=cluster,
                batch_tokens=config.batch_tokens,
                precision=arguments.precision,
                retries=config.retries,
                cache_gb=config.cache_gb,
            )
            reports.append(str(report))
            if arguments.check_reference is not None:
                _check_reference(report, arguments.check_reference or model)
    return "\n".join(reports)


def _check_reference(report: Path, model: str) -> None:
    from gist_ray.evaluation.reference import check_report

    found = check_report(report, model)
    for check in found:
        verdict = "agrees" if check.holds else "DIFFERS"
        scores = f"{check.found:.2f}, published {check.published:.2f}, tolerance {check.tolerance:g}"
        print(f"{check.task}: {scores}: {verdict}", file=sys.stderr)
    wrong = [check.task for check in found if not check.holds]
    if wrong:
        raise RuntimeError(
            f"{len(wrong)} of {len(found)} scores are not those published for {model}: {', '.join(wrong)}"
        )


def _compare(arguments: argparse.Namespace) -> str:
    from gist_ray.evaluation.compare import compare, table

    return table(compare(arguments.before, arguments.after, output=arguments.out))


def _report_folder(model: str, precision: str, parent: Path) -> Path:
    name = Path(model).name.replace(":", "-").replace("#", "-")  # of a URL: its host, port and model
    return parent / (name if precision == "fp32" else f"{name}-{precision}")


def _embed(arguments: argparse.Namespace) -> Path | None:
    names = ("prompt_name", "prompt", "dimensions", "dtype", "backend", "precision", "bad_rows")
    given = {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None}
    tree: dict[str, Any] = {"model": arguments.model, **given}
    if arguments.file in (None, "-"):
        _embed_lines(arguments, tree)
        return None
    from gist_ray.embed_config import EmbedConfig
    from gist_ray.embedding.run import embed
    from gist_ray.recipe_file import parsed_settings

    if arguments.format:
        raise InputError("--format is for lines on stdin; the name of --out says what a file becomes")
    tree["source"] = {"path": arguments.file, "columns": {"text": arguments.column or "text"}}
    tree["source"] |= {"revision": arguments.revision} if arguments.revision else {}
    tree |= {"keep": arguments.keep} if arguments.keep is not None else {}
    workers = {"data_workers": arguments.workers, "data_threads": arguments.threads}
    tree["cluster"] = {name: value for name, value in workers.items() if value is not None}
    name = Path(arguments.file.rstrip("/")).name.split(".")[0]
    if not arguments.out and set(name) & set("*?["):
        raise InputError(f"{arguments.file} is a pattern; name the output with --out")
    config = parsed_settings(EmbedConfig, tree, "embed", tuple(arguments.overrides))
    return embed(config, arguments.out or Path("embeddings") / name)


def _embed_lines(arguments: argparse.Namespace, tree: dict[str, Any]) -> None:
    of_files = ("out", "column", "keep", "revision", "workers")
    useless = next((name for name in of_files if getattr(arguments, name) is not None), None)
    if useless:
        raise InputError(f"--{useless} is for files; lines on stdin have none. Name a FILE, or leave it out")
    try:
        from gist_ray.embed_config import VectorConfig
        from gist_ray.embedding.lines import embed_lines
        from gist_ray.recipe_file import parsed_settings

        config = parsed_settings(VectorConfig, tree, "embed", tuple(arguments.overrides))
        embed_lines(
            config,
            sys.stdin.buffer,
            arguments.stdout.buffer,
            threads=arguments.threads,
            output=arguments.format or "json",
        )
    except BrokenPipeError:  # `head` has enough; what Python still holds goes nowhere at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), arguments.stdout.fileno())
    except KeyboardInterrupt:  # how a filter ends that reads from a terminal
        raise SystemExit(INTERRUPTED) from None


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

    def model_verb(
        name: str, run: Callable[[argparse.Namespace], Any], text: str, *, several: bool = False
    ) -> argparse.ArgumentParser:
        sub = verb(name, run, text)
        sub.add_argument("model", nargs="*" if several else None, help="model folder or Hub id")
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
    sub.add_argument("--start-share", type=float, help="share of the first weights (default: the recipe's)")
    sub.add_argument("--int8", action="store_true", help="add an int8 variant for CPUs, its accuracy measured")
    sub.add_argument("--texts", help="file of lines to calibrate it with (default: the training texts)")

    sub = model_verb("evaluate", _evaluate, "score models with MTEB on Ray", several=True)
    sub.add_argument("--benchmark", metavar="NAME", help="MTEB benchmark, e.g. 'MTEB(eng, v2)' (data from the Hub)")
    sub.add_argument("--tasks", nargs="+", default=[], metavar="TASK", help="MTEB task names (data from the Hub)")
    sub.add_argument("--data", help="folder of local tasks")
    sub.add_argument("--baseline", help="an earlier report to show scores against")
    sub.add_argument("--out", help="report folder (default: reports/MODEL); of several models: of their reports")
    sub.add_argument("--workers", type=int, help="encoder actors (default: 2)")
    sub.add_argument("--threads", type=int, help="threads of each actor (default: 1)")
    sub.add_argument("--endpoint", metavar="URL[#MODEL]", help="score a served model")
    text = "compare the scores with those published for MODEL (default: for this name); exit code 1 if one differs"
    sub.add_argument("--check-reference", nargs="?", const="", metavar="MODEL", help=text)
    sub.add_argument("--retries", type=int, help="how often a task that fails is tried again (default: 0)")
    sub.add_argument("--cache-gb", type=float, help="vectors kept for later runs, on each node (default: 8; 0: none)")
    sub.add_argument("--precision", choices=["fp32", "int8"], default="fp32", help="int8: the exported variant")

    sub = verb("compare", _compare, "two reports -> is the second model better? Paired tests, task by task")
    sub.add_argument("before", help="report folder of the first model")
    sub.add_argument("after", help="report folder of the second")
    sub.add_argument("--out", help="folder for compare.json and compare.html (default: the table alone)")

    sub = verb("embed", _embed, "vectors of the texts of a file or data set on Ray; without FILE, of lines on stdin")
    sub.add_argument("model", help="model folder or Hub id")
    sub.add_argument("file", nargs="?", help="file, folder, glob, bucket or hf://dataset; none: lines on stdin")
    _embed_options(sub)
    overrides(sub, "source.max_rows=1000")

    sub = model_verb("serve", _serve, "serve a model folder over HTTP on this machine until interrupted")
    sub.add_argument("--host", help="address to listen on (default: 127.0.0.1)")
    sub.add_argument("--port", type=int, help="0: a free port (default: 8000)")
    sub.add_argument("--grpc-port", type=int, help="port of the gRPC route (default: there is none)")
    sub.add_argument("--threads", type=int, help="threads of the model (default: 1)")
    sub.add_argument("--backend", choices=["auto", "torch", "openvino"], help="what computes (default: auto)")
    sub.add_argument("--precision", choices=["fp32", "bf16", "fp16", "int8"], help="of the model (default: fp32)")
    sub.add_argument("--model-id", help="name under which it is served (default: the folder's name)")
    return parser


def _embed_options(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--out", help="NAME.npy, NAME.parquet or a folder (default: embeddings/NAME OF FILE)")
    sub.add_argument("--column", help="column that holds the texts (default: text)")
    sub.add_argument("--keep", nargs="*", metavar="NAME", help="columns to put beside the vectors (default: all)")
    sub.add_argument("--revision", help="commit of a Hub dataset")
    sub.add_argument("--prompt-name", help="prompt of the model folder to put before every text")
    sub.add_argument("--prompt", help="prompt to put before every text, exactly as written")
    sub.add_argument("--dimensions", type=int, help="keep the first so many numbers, at unit length again")
    types = ["float32", "float16", "int8", "binary", "ubinary"]
    sub.add_argument("--dtype", choices=types, help="of the numbers (default: float32)")
    sub.add_argument("--bad-rows", choices=["fail", "null"], help="what empty texts and the like do (default: fail)")
    sub.add_argument("--format", choices=["json", "raw"], help="of vectors on stdout (default: json)")
    sub.add_argument("--backend", choices=["auto", "torch", "openvino"], help="what computes (default: auto)")
    sub.add_argument("--precision", choices=["fp32", "bf16", "fp16", "int8"], help="of the model (default: fp32)")
    sub.add_argument("--workers", type=int, help="processes that embed (default: 2)")
    sub.add_argument("--threads", type=int, help="threads of each (default: 1; for lines: all)")


def _recipe(arguments: argparse.Namespace) -> Recipe:
    from gist_ray.recipe_file import load_recipe

    recipe = load_recipe(arguments.recipe, tuple(arguments.overrides))
    name_run(recipe.name)
    return recipe


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
