"""int8: an encoder quantized for CPUs, and what that costs in accuracy, measured and written down.

Post-training quantization of weights and activations (NNCF, for transformers), calibrated on real texts. Other real
texts then say how far the vectors moved. A variant that moved too far is not served.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from gist_ray.encoder import Encoder, TokenIds
from gist_ray.errors import InputError
from gist_ray.openvino_model import OpenVinoModel, converted, written

PROVENANCE = "gist_ray.json"
"""File of a model folder in which its making, and the accuracy of its variants, are recorded."""
INT8_FILE = "openvino/int8.xml"
CALIBRATION_TEXTS = 300
"""As many as NNCF takes by default."""
MIN_TEXTS = 200
MAX_GATE_TEXTS = 2000
NEIGHBOURS = 10
MIN_COSINE = 0.99
MIN_OVERLAP = 0.85


def quantize(encoder: Encoder, tokens: Sequence[TokenIds], folder: Path, *, threads: int = 1) -> dict[str, Any]:
    """Write the int8 variant of an encoder into its model folder; returns its record for `gist_ray.json`.

    `tokens` are those of different real texts. The first `CALIBRATION_TEXTS` of them, or half, set the ranges; the
    others, at most `MAX_GATE_TEXTS`, measure: the cosine of a text's int8 vector with its fp32 one, and the share of
    its nearest neighbours among those texts that stay.

    Raises:
        InputError: too few texts, NNCF or OpenVINO not installed, or an architecture that OpenVINO cannot convert.
    """
    if len(tokens) < MIN_TEXTS:
        raise InputError(
            f"int8 needs at least {MIN_TEXTS} different real texts to calibrate and measure, got {len(tokens)}"
        )
    try:
        import nncf
    except ImportError as error:
        raise InputError('int8 needs NNCF; run: pip install "gist-ray[int8]"') from error
    logging.getLogger("nncf").setLevel(logging.ERROR)
    used = min(CALIBRATION_TEXTS, len(tokens) // 2)
    model, held_out = converted(encoder), list(tokens[used : used + MAX_GATE_TEXTS])
    exact = OpenVinoModel(model, encoder, threads=threads).embed_sorted(held_out)
    quantized = nncf.quantize(
        model,
        nncf.Dataset([[tensor.numpy() for tensor in encoder.padded([row])] for row in tokens[:used]]),
        model_type=nncf.ModelType.TRANSFORMER,
        subset_size=used,
    )
    file = written(quantized, folder / INT8_FILE)
    rough = OpenVinoModel(file, encoder, threads=threads).embed_sorted(held_out)
    cosines = (exact * rough).sum(1) / np.linalg.norm(rough, axis=1)
    overlap = neighbour_overlap(exact, rough, NEIGHBOURS)
    return {
        "file": INT8_FILE,
        "method": f"NNCF {nncf.__version__} post-training quantization",
        "calibration_texts": used,
        "measured_on_texts": len(held_out),
        "mean_cosine": round(float(cosines.mean()), 5),
        "min_cosine": round(float(cosines.min()), 5),
        f"overlap_at_{NEIGHBOURS}": round(overlap, 5),
        "needed": {"mean_cosine": MIN_COSINE, f"overlap_at_{NEIGHBOURS}": MIN_OVERLAP},
        "passed": bool(cosines.mean() >= MIN_COSINE and overlap >= MIN_OVERLAP),
    }


def int8_file(model: str | Path) -> Path:
    """The int8 variant of a model folder.

    Raises:
        InputError: there is none, or it is not accurate enough.
    """
    folder = Path(model).expanduser()
    record = int8_record(folder)
    if record is None or not (folder / INT8_FILE).is_file():
        raise InputError(f"{model} has no int8 variant; make one with `gist-ray export MODEL OUT --int8 --texts FILE`")
    if not record["passed"]:
        found = {name: record[name] for name in record["needed"]}
        raise InputError(
            f"the int8 variant of {model} is not accurate enough to be served: {found}, needed {record['needed']}; "
            "serve it with precision: fp32, or calibrate with texts that are more like those it will read"
        )
    return folder / INT8_FILE


def int8_record(folder: Path) -> dict[str, Any] | None:
    """What `quantize` returned for this model folder, or None."""
    try:
        record: dict[str, Any] | None = json.loads((folder / PROVENANCE).read_text(encoding="utf-8")).get("int8")
    except (OSError, ValueError):
        return None
    return record


def neighbour_overlap(exact: npt.NDArray[np.float32], rough: npt.NDArray[np.float32], neighbours: int) -> float:
    """Of each row's nearest other rows in `exact [n, dim]`, the share that are nearest in `rough [n, dim]` too."""
    found = []
    for vectors in (exact, rough):
        cosines = vectors @ vectors.T
        np.fill_diagonal(cosines, -np.inf)
        found.append(np.argpartition(-cosines, neighbours, axis=1)[:, :neighbours])
    shared = [len(np.intersect1d(one, other)) for one, other in zip(*found, strict=True)]
    return float(np.mean(shared)) / neighbours
