"""Recipe: one frozen, typed tree that says everything about a run.

Unknown keys are errors. Derived numbers are methods, so no number is stated twice. `recipe_file.py` reads it from YAML.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_serializer, field_validator, model_validator

from gist_ray.section import Section
from gist_ray.serving_config import ServingConfig


def _check_no_password(path: str | None) -> None:
    """Recipes are stored with what is made from them, and shown around.

    To be called for a whole section: pydantic's message for a field repeats its value.
    """
    if re.match(r"[a-z0-9+.-]+://[^/@]*:[^/@]*@", path or ""):
        raise ValueError("the path holds a password; give credentials by the environment, as the cloud's tools do")


Role = Literal["query", "pos", "neg"]
_TRIPLET_COLUMNS = ("query", "pos", "neg", "task_name", "query_instruct", "pos_instruct", "neg_instruct", "query_label")
_COLUMNS = frozenset((*_TRIPLET_COLUMNS, "text", "label"))


class SourceConfig(Section):
    """One place that rows come from: a file, a folder, a glob, a bucket, or a Hugging Face dataset id."""

    path: str
    """Local path or glob, `s3://…`, `gs://…` (Parquet, JSONL, CSV, raw MEDI JSON; `.gz` too), or `hf://org/dataset`."""
    revision: str | None = Field(default=None, pattern=r"^[0-9a-f]{40}$")
    """Commit of the Hub dataset, 40 hex digits. Required for `hf://`, so that a run can be repeated."""
    split: str = "train"
    columns: dict[str, str | tuple[str, ...]] = Field(default_factory=dict)
    """Our column name to the source's, e.g. `{query: question, pos: answer, neg: [wrong_1, wrong_2]}`. Only `neg` may
    take several."""
    task_name: str | None = None
    """Overrides the task of every row of this source."""
    tasks: str | None = None
    """Regular expression, found anywhere in the task's name: rows of other tasks are left out, and counted."""
    max_rows: int | None = Field(default=None, ge=1)
    """Rows of the selected tasks after which reading stops, rejected ones included."""
    weight: float = Field(default=1.0, gt=0, le=1000)
    """How often an epoch shows each row. 0.5 shows half of them, the other half in the next epoch."""

    @field_validator("columns")
    @classmethod
    def _columns_are_known(cls, columns: dict[str, Any]) -> dict[str, Any]:
        for ours, theirs in columns.items():
            if ours not in _COLUMNS:
                raise ValueError(f"`{ours}` is none of our columns; they are {', '.join(sorted(_COLUMNS))}")
            if ours != "neg" and not isinstance(theirs, str):
                raise ValueError(f"`{ours}` takes one column, not {list(theirs)}; only `neg` takes several")
        return columns

    @field_validator("tasks")
    @classmethod
    def _tasks_compile(cls, tasks: str | None) -> str | None:
        try:
            re.compile(tasks or "")
        except re.error as error:
            raise ValueError(f"not a regular expression: {error}") from None
        return tasks

    @model_validator(mode="after")
    def _hub_is_pinned(self) -> SourceConfig:
        if self.path.startswith("hf://") and not self.revision:
            raise ValueError(f"{self.path} needs `revision: <commit>`: an unpinned dataset cannot be reproduced")
        return self

    @model_validator(mode="after")
    def _no_secret(self) -> SourceConfig:
        _check_no_password(self.path)
        return self


class FilterConfig(Section):
    """Rows to leave out by what the guide says of them. Off by default; what is left out is a counted reject."""

    guide_order: bool = False
    """Drop rows where the guide ranks a negative above the positive: guide(q, p) < guide(q, n)."""
    min_similarity: float | None = Field(default=None, ge=-1, le=1)
    """Drop rows with guide(q, p) below this."""


class DataConfig(Section):
    """What is trained on."""

    sources: tuple[SourceConfig, ...] = Field(min_length=1, max_length=65_535)
    instructions: frozenset[Role] = frozenset()
    """Roles whose texts are prefixed with their `*_instruct` column. The paper drops all instructions."""
    max_chars: int = Field(default=100_000, ge=1)  # a longer text is almost always a parsing accident: rejected
    filters: FilterConfig = FilterConfig()

    @field_serializer("instructions")
    def _sorted(self, roles: frozenset[Role]) -> list[str]:
        return sorted(roles)  # a set has no order of its own, a fingerprint needs one


class ModelConfig(Section):
    """An encoder to load: sentence-transformers folder, bare transformers folder, or Hub id."""

    path: str
    revision: str | None = None
    max_tokens: int | None = Field(default=None, ge=4)
    """None: what the model folder says."""
    pooling: Literal["mean", "cls"] | None = None
    """None: what the model folder says (mean for a bare transformers folder)."""
    prompt: str = ""
    """Put before every text, exactly as written."""

    @field_validator("path")
    @classmethod
    def _folder_is_absolute(cls, path: str) -> str:
        # Workers start in folders of their own, where a relative path would mean another model, or a Hub id.
        folder = Path(path).expanduser()
        return str(folder.absolute()) if folder.is_dir() else path


class StudentConfig(ModelConfig):
    """The encoder that is trained."""

    layers: tuple[int, ...] | None = None
    """Keep only these transformer layers (0-based) of the loaded model, in this order. `[]` keeps none: a text is then
    the mean of its word vectors and of their positions'."""

    @field_validator("layers")
    @classmethod
    def _layers_ascend(cls, layers: tuple[int, ...] | None) -> tuple[int, ...] | None:
        if layers and (list(layers) != sorted(set(layers)) or layers[0] < 0):
            raise ValueError(f"layers {list(layers)} must be distinct, ascending and not negative, e.g. [0, 2, 4]")
        return layers

    @field_validator("prompt")
    @classmethod
    def _no_prompt(cls, prompt: str) -> str:
        if prompt:  # the exported folder would not apply it, and be scored and served on other inputs than trained
            raise ValueError("a student's prompt is not supported yet; put it into the texts")
        return prompt


class GuideConfig(ModelConfig):
    """The frozen encoder that decides which in-batch candidates are false negatives."""

    batch_tokens: int | None = Field(default=None, ge=16)
    """Padded tokens per guide forward. None: what suits the device."""
    vectors_dir: str | None = None
    """Where guide vectors are kept for other runs. None: `output_dir/guide-vectors`. They are found by content: guide,
    settings and text."""


class LossConfig(Section):
    """Guided in-batch contrastive loss (arXiv 2402.16829)."""

    temperature: float = Field(default=0.01, gt=0)
    guide: Literal["frozen", "student", "none"] = "frozen"
    """Whose similarities hide candidates: the guide's; the student's own of this very step (self-guide, which can
    collapse: sentence-transformers #3662); or nobody's, so that only identical texts are hidden."""
    margin: float = Field(default=0.0, ge=-1, le=1)  # hidden: guide(candidate) > guide(query, positive) - margin
    margin_kind: Literal["absolute", "relative"] = "absolute"
    hide_same_label: bool = True
    """Hide candidates that are known to bear the query's label: triplets of `mine` say it in `query_label`."""
    show_other_labels: bool = False
    """Show candidates that are known to bear another label of the query's task, even if they look alike to the guide,
    whose soft labels give them no share. For labels that are right and that exclude each other."""
    show_own_negatives: bool = False
    """Show a row's own hard negatives to its query, even if they look right to the guide, whose soft labels give them
    no share. For negatives that somebody judged, such as contradictions."""
    contrast_queries: bool = True
    contrast_positives: bool = True
    matryoshka_dims: tuple[int, ...] = ()
    """Shorter vectors that are trained too (arXiv 2205.13147): the loss is the mean over these and the full length."""
    soft_label_weight: float = Field(default=0.0, ge=0, le=1)
    """Share of the row's loss that is KL(guide || student) over the candidates that are not hidden: distillation."""
    soft_label_temperature: float = Field(default=0.05, gt=0)

    @field_validator("matryoshka_dims")
    @classmethod
    def _dims_are_distinct(cls, dims: tuple[int, ...]) -> tuple[int, ...]:
        if len(set(dims)) < len(dims) or min(dims, default=1) < 1:
            raise ValueError(f"dimensions {list(dims)} must be distinct and positive, e.g. [256, 128, 64]")
        return tuple(sorted(dims, reverse=True))

    @model_validator(mode="after")
    def _soft_labels_have_a_guide(self) -> LossConfig:
        if self.soft_label_weight and self.guide != "frozen":
            raise ValueError(f"soft_label_weight needs `guide: frozen`, not `{self.guide}`: it learns from the guide")
        return self


class LoraConfig(Section):
    """Train low-rank adapters instead of all weights (arXiv 2106.09685); needs `pip install "gist-ray[lora]"`."""

    rank: int = Field(default=16, ge=1)
    alpha: float = Field(default=32, gt=0)
    dropout: float = Field(default=0.0, ge=0, lt=1)
    target_modules: tuple[str, ...] = ()  # as peft names them; empty: every linear layer of the encoder's blocks


class TrainConfig(Section):
    """How the student is trained."""

    batch_size: int = Field(default=128, ge=2)
    """Triplets per optimizer step over all workers, whose number changes rounding and dropout, not the batches."""
    epochs: int = Field(default=1, ge=1)
    learning_rate: float = Field(default=2e-5, gt=0)
    warmup_ratio: float = Field(default=0.1, ge=0, le=1)
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    weight_decay: float = Field(default=0.0, ge=0)
    max_grad_norm: float = Field(default=1.0, gt=0)
    task_temperature: float = Field(default=1.0, ge=1)
    """Order of the tasks in an epoch: its first batch is of a task with probability ~ batches^(1/temperature). 1 mixes
    evenly; more brings small tasks forward. Every row is shown once all the same."""
    length_window: int = Field(default=32, ge=1)
    """Batches within which rows are sorted by length before they are cut into batches. 1: no sorting."""
    dropout: float | None = Field(default=None, ge=0, lt=1)
    """None: what the model folder says. 0 makes the result independent of the number of workers, to rounding."""
    start_share: float = Field(default=0.0, ge=0, lt=1)
    """Share, in the finished model's weights, of those that training started from: what is not trained for is kept
    better, what is trained for gains less (arXiv 2109.01903, eq. 2). Checkpoints are validated so too."""
    seed: int = Field(default=42, ge=0)
    zero_stage: Literal[0, 1, 2, 3] = 0
    """What DeepSpeed divides over workers: 0 nothing (fastest, 16 bytes a parameter on each), 1 Adam's moments, 2 also
    gradients, 3 also weights (from a billion parameters on)."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16: forward and backward in autocast; weights, moments and the loss stay fp32."""
    chunk_tokens: int | None = Field(default=None, ge=16)
    """Padded tokens per student forward: bounds padding, not the batch. None: what suits the device."""
    activation_mb: int | None = Field(default=None, ge=0)
    """Memory of each worker for activations. Chunks beyond it are computed twice (GradCache, arXiv 2101.06983), to the
    same result. None: half of what is free at the start, and less where a batch needs much more."""
    activation_checkpointing: bool = False  # compute each layer again in its backward pass: for chunks that do not fit
    compile: bool = False  # torch.compile the student
    lora: LoraConfig | None = None
    deepspeed: dict[str, Any] = Field(default_factory=dict)
    """DeepSpeed settings to merge into ours, or the path of their JSON file. What the recipe decides cannot be set."""
    log_steps: int = Field(default=1, ge=1)
    checkpoint_steps: int = Field(default=200, ge=1)
    keep_checkpoints: int = Field(default=2, ge=1)
    storage_path: str | None = None
    """Where checkpoints go while training runs: a folder that all nodes see, or `s3://…`. None: the run's folder."""

    @field_validator("deepspeed", mode="before")
    @classmethod
    def _read_deepspeed(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        try:
            return json.loads(Path(value).expanduser().read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ValueError(f"not a readable JSON file: {error}") from None

    @model_validator(mode="after")
    def _no_secret(self) -> TrainConfig:
        _check_no_password(self.storage_path)
        return self

    def warmup_steps(self, total_steps: int) -> int:
        """Optimizer steps of linear warm-up."""
        return round(self.warmup_ratio * total_steps)


class ClusterConfig(Section):
    """Which machines do the work."""

    address: str | None = None
    """Ray address. None: the cluster of `RAY_ADDRESS` (set inside a Ray job), else a Ray of our own on this machine."""
    require_token: bool = True
    """Refuse a cluster that asks for no token, unless it is on loopback."""
    num_workers: int | tuple[int, int] = 1
    """Training workers. `[min, max]`: as many as the cluster holds, and again when nodes come or go."""
    cpus_per_worker: float = Field(default=1, gt=0)
    gpus_per_worker: float = Field(default=0, ge=0)
    """GPUs of each training worker and of each guide, mining and evaluation actor. 0: they compute on the CPU."""
    threads_per_worker: int = Field(default=1, ge=1)
    data_workers: int = Field(default=2, ge=1)
    """Guide, mining and evaluation actors; fewer of the first two where the cluster does not hold them."""
    data_threads: int = Field(default=1, ge=1)
    """Threads of each of those actors."""
    max_failures: int = Field(default=3, ge=0)
    """How often training restarts from its last checkpoint, and how often a guide or mining actor is replaced.
    Preempted nodes do not count."""

    @field_validator("num_workers")
    @classmethod
    def _workers_ordered(cls, workers: int | tuple[int, int]) -> int | tuple[int, int]:
        low, high = (workers, workers) if isinstance(workers, int) else workers
        if not 1 <= low <= high:
            raise ValueError(f"{workers} must be a number from 1, or [min, max] with 1 <= min <= max")
        return workers

    def max_workers(self) -> int:
        """Most training workers there can be."""
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[1]


class ValidationConfig(Section):
    """How the best checkpoint is chosen while training runs: on development rows, never on test data."""

    rows: int = Field(default=0, ge=0)
    """Rows held out of training. Each checkpoint is scored by how it ranks their positives; the best one is the
    result of `train`. 0: the last one is."""
    data: str | None = None
    """Folder of local tasks, as `evaluate --data` takes, to score checkpoints on; their mean chooses the best one,
    whatever the held-out rows say. Development data: what is chosen on is no longer a test."""
    batch_tokens: int | None = Field(default=None, ge=16)

    @property
    def wanted(self) -> bool:
        """Whether checkpoints are scored at all."""
        return self.rows > 0 or self.data is not None


class MlflowConfig(Section):
    """Log to MLflow; needs `pip install mlflow-skinny`."""

    tracking_uri: str | None = None  # None: `MLFLOW_TRACKING_URI`
    experiment: str = "gist-ray"

    @model_validator(mode="after")
    def _no_secret(self) -> MlflowConfig:
        _check_no_password(self.tracking_uri)
        return self


class WandbConfig(Section):
    """Log to Weights & Biases; needs `pip install wandb`."""

    project: str = "gist-ray"
    entity: str | None = None
    mode: Literal["online", "offline"] = "online"


class TrackingConfig(Section):
    """Where else metrics go. `metrics.jsonl`, TensorBoard and Ray's Prometheus endpoint always have them."""

    mlflow: MlflowConfig | None = None
    wandb: WandbConfig | None = None


class EvaluationConfig(Section):
    """How models are scored."""

    tasks: tuple[str, ...] = ()
    """MTEB task names from the Hub."""
    benchmark: str | None = None
    """Name of an MTEB benchmark, e.g. `MTEB(eng, v2)`."""
    data: str | None = None
    """Folder of local tasks."""
    batch_tokens: int | None = Field(default=None, ge=16)
    """Padded tokens per forward. None: what suits the device."""
    retries: int = Field(default=0, ge=0)
    """How often a task that fails is tried again."""
    cache_gb: float = Field(default=8.0, ge=0)
    """Vectors kept on each node's disk for later runs, at most. 0: none are."""


class Recipe(Section):
    """Everything about a run."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")
    output_dir: str = "runs"
    """Artifacts go to `output_dir/name/`. On several nodes: storage that all of them see."""
    data: DataConfig
    student: StudentConfig
    guide: GuideConfig
    loss: LossConfig = LossConfig()
    train: TrainConfig = TrainConfig()
    cluster: ClusterConfig = ClusterConfig()
    validation: ValidationConfig = ValidationConfig()
    tracking: TrackingConfig = TrackingConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    serving: ServingConfig = ServingConfig()

    @model_validator(mode="after")
    def _batch_feeds_every_worker(self) -> Recipe:
        if self.train.batch_size < self.cluster.max_workers():
            raise ValueError(
                f"train.batch_size {self.train.batch_size} is below cluster.num_workers {self.cluster.max_workers()}"
            )
        return self

    def run_dir(self) -> Path:
        """Folder of this run's artifacts, absolute: Ray workers start elsewhere."""
        return Path(self.output_dir).expanduser().absolute() / self.name

    def shards_dir(self) -> Path:
        """Where `prepare` writes."""
        return self.run_dir() / "shards"

    def guide_vectors_dir(self) -> Path:
        """Where guide vectors are kept for all runs."""
        return Path(self.guide.vectors_dir or Path(self.output_dir) / "guide-vectors").expanduser().absolute()

    def checkpoint_dir(self) -> Path:
        """Where `train` writes its finished checkpoint."""
        return self.run_dir() / "checkpoint"
