"""The wire: what callers send and get, as pydantic models. Parsed once here, never validated again inside."""

from datetime import UTC, datetime
from http import HTTPStatus
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, StringConstraints, Tag

from app.recipe import Dtype, Profile

Finite = Annotated[float, Field(allow_inf_nan=False)]
# a namespace and a name, as on the Hub; never a path component of ours
Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,95}/[A-Za-z0-9][A-Za-z0-9._-]{0,95}$")]
TASK_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,95}$"
TaskName = Annotated[str, StringConstraints(pattern=TASK_NAME)]
Pattern = Annotated[str, StringConstraints(max_length=512)]
BASE_HELP = (
    "for methods that learn and adapters whose deltas depend on its weights (DoRA): hub:org/name[@revision], "
    "dir:<folder below the operator's BRAID_BASES_DIR>, or sha256:<base id>"
)
BASE_RANK_HELP = "what an adapter that depends on the base model's weights is cut to; default: energy 0.999, max 256"
EXTRAS_HELP = (
    "what becomes of trained modules, biases and tokens that adapters hold beside their deltas, and of the magnitudes where all "
    "are DoRA: refuse; average: by weight; or {from: NAME}"
)
MODEL_HELP = "hub:org/name[@revision], dir:<folder below the operator's BRAID_BASES_DIR>, or sha256:<base id>; safetensors only"
DATA_HELP = "sha256:<id> of rows uploaded to POST /data, or hub:datasets/org/name[@revision]"
HUB_HELP = "hub:org/name[/subfolder or file.safetensors][@revision]"
SOURCE_HELP = f"{HUB_HELP}, sha256:<adapter id>, or name:<namespace>/<name>"


class Body(BaseModel):
    """What callers send: unknown fields are refused, since a misspelt one would otherwise be silently without effect.

    Strict: `"rank": true` is a mistake, not rank 1.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class AdapterInput(Body):
    source: str = Field(max_length=1000, description=SOURCE_HELP, examples=["hub:org/math-lora@main"])
    name: TaskName | None = Field(default=None, description="the task's name in reports; default: from the source")
    weight: Finite | None = Field(
        default=None,
        description="mixing coefficient of any sign; for all adapters or for none (then 1/n each, or the method's own)",
    )
    weights_by_module: dict[Pattern, Finite] = Field(
        default={}, max_length=100, description="pattern found in the module's name -> weight there"
    )


class EnergyRank(Body):
    energy: float = Field(gt=0, le=1, description="fraction of the squared norm to keep, per module")
    max: int | None = Field(default=None, ge=1, description="at most this rank")


def _rank_kind(value: object) -> str:
    return "energy" if isinstance(value, dict | EnergyRank) else "integer"


# told apart before they are checked, so that a problem names the one field that is wrong
RankRequest = Annotated[
    Annotated[int, Field(ge=1), Tag("integer")] | Annotated[EnergyRank, Tag("energy")], Discriminator(_rank_kind)
]


class HeavyTailRank(Body):
    heavy_tail: int = Field(ge=1, description="mean rank over all modules: more where the spectrum falls slowly")
    max: int | None = Field(default=None, ge=1, description="at most this rank")


def _extract_rank_kind(value: object) -> str:
    if isinstance(value, HeavyTailRank) or (isinstance(value, dict) and "heavy_tail" in value):
        return "heavy_tail"
    return _rank_kind(value)


ExtractRank = Annotated[
    Annotated[int, Field(ge=1), Tag("integer")]
    | Annotated[EnergyRank, Tag("energy")]
    | Annotated[HeavyTailRank, Tag("heavy_tail")],
    Discriminator(_extract_rank_kind),
]
ModelName = Annotated[str, StringConstraints(min_length=1, max_length=200, pattern=r"^[^\x00-\x1f\x7f-\x9f\u2028\u2029]+$")]


class PostStepRequest(Body):
    name: str = Field(max_length=100, description="see `post_steps` in GET /methods")
    parameters: dict[str, Any] = Field(default={}, description="the step's own parameters")


Column = Annotated[str, StringConstraints(min_length=1, max_length=200)]


class LearningTask(Body):
    name: TaskName
    weight: float = Field(default=1.0, gt=0, allow_inf_nan=False, description="of this task's loss")
    data: str = Field(max_length=1000, description=DATA_HELP, examples=["hub:datasets/org/reviews@main"])
    split: str | None = Field(default=None, max_length=100, description="of a Hub dataset; default: train")
    text: Column = Field(default="text", description="column of the text")
    label: Column | None = Field(default="label", description="column of the class; not read where nothing needs labels")
    prompt: Column | None = Field(default=None, description="causal_lm: column of what stands before the text and is not learned")
    head: str | None = Field(default=None, max_length=100, description="sha256:<id> of an uploaded safetensors: weight, bias")
    forget: bool = Field(default=False, description="objective negation: lose this task's skill, keep the others'")


class ExtrasFrom(Body):
    name: TaskName = Field(alias="from", description="the adapter, by its name in this merge, whose extras the result has")


class MergeRequest(Body):
    method: str = Field(default="task_arithmetic", max_length=100, description="see GET /methods")
    parameters: dict[str, Any] = Field(default={}, description="the method's own parameters")
    adapters: list[AdapterInput] = Field(min_length=1, max_length=256)
    rank: RankRequest | None = Field(default=None, description="an integer, an energy, or null: exact")
    dtype: Dtype = Field(default="auto", description="of the result; auto is the widest among the inputs")
    seed: int = Field(default=0, ge=0, lt=2**63)
    profile: Profile = Field(
        default="portable",
        description="portable: one rank everywhere, loads on every server; compact: no padding; vllm: so at a rank of vLLM's",
    )
    allow_base_mismatch: bool = Field(default=False, description="merge adapters of different base models all the same")
    base_model: str | None = Field(default=None, max_length=1000, description=BASE_HELP)
    base_rank: RankRequest | None = Field(default=None, description=BASE_RANK_HELP)
    extras: Literal["refuse", "average"] | ExtrasFrom = Field(default="refuse", description=EXTRAS_HELP)
    tasks: list[LearningTask] = Field(default=[], max_length=64, description="what a method that learns is to serve")
    post: list[PostStepRequest] = Field(default=[], max_length=8, description="steps on the result, after it is cut to its rank")
    name: Name | None = Field(default=None, description="also make the result known as name:<this>")


class ExtendRequest(Body):
    adapter: AdapterInput
    parameters: dict[str, Any] = Field(default={}, description="the method's own, where they differ from the basis's")
    dtype: Dtype = Field(default="auto", description="of the adapter when it is reconstructed; auto is its own")
    seed: int = Field(default=0, ge=0, lt=2**63)
    allow_base_mismatch: bool = Field(default=False, description="add an adapter of another base model all the same")
    base_model: str | None = Field(default=None, max_length=1000, description=BASE_HELP)
    base_rank: RankRequest | None = Field(default=None, description=BASE_RANK_HELP)


class ExtractRequest(Body):
    base: str = Field(max_length=1000, description=MODEL_HELP, examples=["hub:org/base@main"])
    tuned: str = Field(max_length=1000, description="the same after full fine-tuning: as base", examples=["dir:tuned"])
    rank: ExtractRank = Field(description="an integer, an energy per module, or a mean rank spread by heavy tails")
    dtype: Dtype = Field(default="auto", description="of the adapter; auto is the widest among both models' linear layers")
    seed: int = Field(default=0, ge=0, lt=2**63, description="of the sketches")
    profile: Profile = Field(
        default="portable", description="portable: one rank everywhere, loads on every server; compact: no padding"
    )
    include: list[Pattern] = Field(default=[], max_length=100, description="patterns of heads to extract as well: lm_head")
    exclude: list[Pattern] = Field(default=[], max_length=100, description="patterns of modules to leave out")
    leftover: Literal["report", "refuse"] = Field(
        default="report", description="where more has changed than a plain LoRA can hold: report it in the certificate, or refuse"
    )
    base_model_name: ModelName | None = Field(
        default=None, description="what the adapter calls its base model; default: org/name, or the folder's name"
    )
    name: Name | None = Field(default=None, description="also make the result known as name:<this>")


class ReconstructRequest(Body):
    task: TaskName | None = Field(default=None, description="one task, as it was")
    weights: dict[TaskName, Finite] | None = Field(default=None, max_length=64, description="or a mix: task -> weight")
    rank: RankRequest | None = Field(default=None, description="of a mix: an integer, an energy, or null: exact")
    name: Name | None = Field(default=None, description="also make it known as name:<this>")


class ImportRequest(Body):
    source: str = Field(max_length=1000, description=HUB_HELP, examples=["hub:org/math-lora@main"])
    name: Name | None = Field(default=None, description="also make it known as name:<this>")


class UploadFields(Body):
    name: Name | None = Field(default=None, description="also make it known as name:<this>")
    base_model: str | None = Field(
        default=None, min_length=1, max_length=500, description="of a single file, instead of what its metadata says"
    )


class Problem(BaseModel):
    """RFC 9457; members beyond these name the field, module or tensor concerned."""

    model_config = ConfigDict(extra="allow")

    type: str
    title: str
    status: int
    detail: str


def problems(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """What OpenAPI says of answers that are problems."""
    content = {"application/problem+json": {"schema": Problem.model_json_schema()}}
    return {status: {"description": HTTPStatus(status).phrase, "content": content} for status in statuses}


class Progress(BaseModel):
    stage: str = Field(
        description="queued, fetch (counts adapters), ground (counts modules), learn (counts steps), "
        "survey (counts modules, in rounds), "
        "merge (counts modules, also of an extraction), assemble"
    )
    done: int
    total: int
    loss: float | None = Field(default=None, description="learn: mean of the steps between the last two looks")
    score: float | None = Field(default=None, description="learn: minus the loss of the held-out rows at the last look")


class ResultView(BaseModel):
    kind: Literal["adapter", "basis"]
    id: str
    links: dict[str, str]


class CurvePoint(BaseModel):
    step: int
    loss: float | None = Field(description="mean of the steps since the last point")
    score: float = Field(description="minus the mean loss of the held-out rows")
    tasks: dict[str, float] = Field(description="each task's loss on its held-out rows, at its best temperature")


class Learning(BaseModel):
    step: int
    steps: int
    best_step: int
    coefficients: int
    accuracy: dict[str, float] | None = Field(description="on the held-out rows, with the best coefficients, once it is done")
    curve: list[CurvePoint]
    best: list[dict[str, float | list[float]]] = Field(description="the best coefficients so far, by adapter and block")


class JobView(BaseModel):
    id: str
    state: Literal["queued", "running", "succeeded", "failed", "cancelled"]
    method: str
    attempt: int
    progress: Progress
    result: ResultView | None
    error: Problem | None
    learning: Learning | None = Field(default=None, description="of a method that learns: how far it is, and its curve")
    certificate: dict[str, Any] | None = Field(default=None, description="the merge's report.json, for a job that succeeded")
    links: dict[str, str]
    created_at: datetime
    finished_at: datetime | None


class JobList(BaseModel):
    data: list[JobView]
    next: str | None


class TaskView(BaseModel):
    name: str
    input: str
    relative_error: float = Field(description="measured: ||reconstructed - adapter|| / ||adapter||")
    links: dict[str, str]


class BasisView(BaseModel):
    id: str
    name: str | None
    base_model: str
    modules: int
    codecs: dict[str, int] = Field(description="codec -> number of modules")
    input_bytes: int = Field(description="the adapters' factors as bf16")
    size_bytes: int = Field(description="what is kept of them")
    file_bytes: int
    recipe: str
    extends: str | None
    tasks: list[TaskView]
    links: dict[str, str]
    created_at: datetime


class BasisList(BaseModel):
    data: list[BasisView]
    next: str | None


class Reconstruction(BaseModel):
    adapter: "AdapterView"
    task: str | None
    weights: dict[str, float]
    relative_error: float = Field(description="measured for one task; for a mix a bound: the sum of the parts' errors")
    rounding_error: float


class AdapterView(BaseModel):
    id: str
    name: str | None
    base_model: str
    modules: int
    rank: int
    size_bytes: int
    source: str
    licence: str | None
    recipe: str | None
    inputs: list[str]
    links: dict[str, str]
    created_at: datetime


class AdapterList(BaseModel):
    data: list[AdapterView]
    next: str | None


class DataView(BaseModel):
    id: str
    kind: Literal["jsonl", "parquet", "safetensors"]
    rows: int = Field(description="of a classification head (safetensors): its classes")
    columns: list[str] = Field(description="in order; of a classification head: its tensors")
    size_bytes: int
    source: str | None = Field(description="where it came from, unless it was uploaded")
    links: dict[str, str]
    created_at: datetime


class DataList(BaseModel):
    data: list[DataView]
    next: str | None


class MethodView(BaseModel):
    name: str
    summary: str
    paper: str
    version: int
    needs: Literal["nothing", "base", "data"]
    memory: Literal["factors", "dense"]
    produces: Literal["adapter", "basis"]
    min_adapters: int
    max_adapters: int | None
    default_weight: float | None = Field(description="of every adapter where none is given; null is 1/n")
    breaks: dict[str, str] = Field(description="laws of merging that the method's definition breaks, and why")
    parameters: dict[str, Any] = Field(description="JSON Schema of the method's parameters")


class PostStepView(BaseModel):
    name: str
    summary: str
    paper: str
    version: int
    parameters: dict[str, Any] = Field(description="JSON Schema of the step's parameters")


class MethodList(BaseModel):
    data: list[MethodView]
    post_steps: list[PostStepView]


class Health(BaseModel):
    status: Literal["ok"]


def utc(seconds: float) -> datetime:
    return datetime.fromtimestamp(seconds, UTC)
