"""The one table from exceptions to RFC 9457 problems. Routes, the worker and the command line all speak through it.

RequestError
├── UnknownAdapter        no adapter of that id or name is in the store
├── UnknownBasis          no basis of that id
├── UnknownTask           the basis has no task of that name
├── UnknownJob            no job of that id
├── UnknownBaseModel      no base model of that id or directory
├── UnknownData           no data file of that id
├── UnknownSplit          the dataset has no such split in a form that is read here
├── UnknownPart           the adapter, basis or job has no file of that name
├── InvalidField          a field, flag or setting has a value that cannot be used
├── InvalidData           a data file is not what it must be
├── MissingColumn         the data has no such column, or a row has not
├── BadUpload             the form lacks a file, or has one more
├── UnsupportedMediaType  the body is neither JSON nor, where that is taken, a form
├── NotInstalled          an optional part of Braid is needed and missing
├── NotReady              a part of the service cannot be used
├── BadData               rows or a head that a method cannot learn from
├── BadBase               a base model that cannot be loaded, or not for this
├── OutOfMemory           training does not fit the device, not even with half of the batch
├── WorkerLost            the process of a job died too often
└── WorkerBusy            another worker of that name runs on this data directory
"""

import dataclasses
import errno
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from merge_algos import errors as merging
from storage import errors as storing


class RequestError(Exception):
    """Root of what only the service can refuse."""


@dataclass(eq=False)
class UnknownAdapter(RequestError):
    source: str

    def __str__(self) -> str:
        return f"no adapter {self.source[:200]!r} is in the store"


@dataclass(eq=False)
class UnknownBasis(RequestError):
    basis: str

    def __str__(self) -> str:
        return f"no basis {self.basis[:200]!r} is in the store"


@dataclass(eq=False)
class UnknownTask(RequestError):
    task: str
    tasks: tuple[str, ...]

    def __str__(self) -> str:
        return f"the basis has no task {self.task[:100]!r}; it has {', '.join(self.tasks)}"


@dataclass(eq=False)
class UnknownJob(RequestError):
    job: str

    def __str__(self) -> str:
        return f"no job {self.job[:200]!r}"


@dataclass(eq=False)
class UnknownBaseModel(RequestError):
    source: str

    def __str__(self) -> str:
        return f"no base model {self.source[:200]!r} is in the store, or in the directory that the operator allows"


@dataclass(eq=False)
class UnknownData(RequestError):
    data: str

    def __str__(self) -> str:
        return f"no data file {self.data[:200]!r} is in the store"


@dataclass(eq=False)
class UnknownSplit(RequestError):
    source: str
    split: str
    files: tuple[str, ...]

    def __str__(self) -> str:
        held = f"it holds {', '.join(self.files)}" if self.files else "it holds no Parquet or JSONL files"
        return f"{self.source[:200]} has no split {self.split[:100]!r}; {held}"


@dataclass(eq=False)
class UnknownPart(RequestError):
    part: str

    def __str__(self) -> str:
        return f"there is no {self.part[:100]} here"


@dataclass(eq=False)
class InvalidField(RequestError):
    field: str
    reason: str

    def __str__(self) -> str:
        return f"{self.field}: {self.reason}"


@dataclass(eq=False)
class InvalidData(RequestError):
    reason: str
    line: int | None = None

    def __str__(self) -> str:
        where = "" if self.line is None else f" (line {self.line})"
        return f"not a data file that can be used: {self.reason}{where}"


@dataclass(eq=False)
class MissingColumn(RequestError):
    column: str
    columns: tuple[str, ...]
    line: int | None = None

    def __str__(self) -> str:
        where = "the data" if self.line is None else f"line {self.line} of the data"
        return f"{where} has no column {self.column[:100]!r}; it has {', '.join(self.columns)[:1000] or 'none'}"


@dataclass(eq=False)
class BadUpload(RequestError):
    reason: str

    def __str__(self) -> str:
        return f"the upload cannot be read: {self.reason}"


@dataclass(eq=False)
class UnsupportedMediaType(RequestError):
    media_type: str
    accepted: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.media_type[:100]!r} is not accepted here; send {' or '.join(self.accepted)}"


@dataclass(eq=False)
class NotInstalled(RequestError):
    package: str
    extra: str

    def __str__(self) -> str:
        return f"this needs {self.package}, which is not installed here: pip install 'lora-braid[{self.extra}]'"


@dataclass(eq=False)
class NotReady(RequestError):
    part: str
    reason: str

    def __str__(self) -> str:
        return f"{self.part} is not ready: {self.reason}"


@dataclass(eq=False)
class BadData(RequestError):
    task: str
    reason: str

    def __str__(self) -> str:
        return f"task {self.task[:100]!r}: {self.reason}"


@dataclass(eq=False)
class BadBase(RequestError):
    reason: str

    def __str__(self) -> str:
        return f"the base model cannot be used: {self.reason}"


@dataclass(eq=False)
class OutOfMemory(RequestError):
    device: str

    def __str__(self) -> str:
        return f"training does not fit {self.device} with half of the batch either; a smaller batch_size or max_length helps"


@dataclass(eq=False)
class WorkerLost(RequestError):
    deaths: int

    def __str__(self) -> str:
        return f"the process of this job died {self.deaths} times in a row, most likely for lack of memory; ask again to retry"


@dataclass(eq=False)
class WorkerBusy(RequestError):
    worker_id: str

    def __str__(self) -> str:
        return f"a worker named {self.worker_id!r} already runs on this data directory; give this one another BRAID_WORKER_ID"


STATUS: Mapping[type[Exception], int] = {
    UnknownAdapter: 404,
    UnknownBasis: 404,
    UnknownTask: 404,
    UnknownJob: 404,
    UnknownBaseModel: 404,
    UnknownData: 404,
    UnknownSplit: 404,
    UnknownPart: 404,
    InvalidField: 422,
    InvalidData: 422,
    MissingColumn: 422,
    BadUpload: 400,
    UnsupportedMediaType: 415,
    NotInstalled: 501,
    NotReady: 503,
    BadData: 422,
    BadBase: 422,
    OutOfMemory: 507,
    WorkerLost: 500,
    WorkerBusy: 409,
    merging.UnknownMethod: 422,
    merging.InvalidParams: 422,
    merging.InvalidRank: 422,
    merging.InvalidWeights: 422,
    merging.WrongCount: 422,
    merging.BadPattern: 422,
    merging.BaseModelMismatch: 409,
    merging.ShapeMismatch: 422,
    merging.NonFiniteTensor: 422,
    merging.NonFiniteResult: 422,
    merging.TrainingDiverged: 422,
    merging.IncomparableTensor: 422,
    merging.NothingToExtract: 422,
    merging.LeftoverTensors: 422,
    merging.UnsupportedAdapter: 422,
    storing.BadDigest: 422,
    storing.BlobNotFound: 404,
    storing.DigestMismatch: 502,
    storing.BlobTooLarge: 413,
    storing.StoreFull: 507,
    storing.InvalidTensorFile: 422,
    storing.BadSource: 422,
    storing.NoBaseModel: 422,
    storing.RepoNotFound: 404,
    storing.RevisionNotFound: 404,
    storing.GatedRepo: 403,
    storing.TokenRefused: 401,
    storing.PickleOnly: 422,
    storing.NotAnAdapter: 422,
    storing.SeveralAdapters: 422,
    storing.HubUnavailable: 502,
}

_DISK_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


def problem(error: Exception) -> dict[str, Any]:
    """RFC 9457 members for any exception; the error's own fields become extension members.

    An exception outside the table is a defect of ours: it says so and tells nothing else.
    """
    if isinstance(error, OSError) and error.errno in _DISK_FULL:
        return problem(storing.StoreFull(error.strerror or "the disk is full"))
    status = STATUS.get(type(error))
    if status is None:
        return make_problem(
            500, "internal-error", f"an unexpected {type(error).__name__}; the log of the service has the details"
        )
    return make_problem(status, slug(type(error)), str(error), **_fields(error))


# what a command or a process of ours tells in a sentence: the system refuses, too (a port in use, a full disk)
REFUSALS: tuple[type[Exception], ...] = (OSError, *STATUS)


def sentence(error: Exception) -> str:
    """The system's own text has an error number where people look for the reason."""
    if not isinstance(error, OSError) or error.strerror is None:
        return str(error)
    return f"{error.filename}: {error.strerror}" if error.filename else error.strerror


def make_problem(status: int, kind: str, detail: str, **members: Any) -> dict[str, Any]:
    title = kind.replace("-", " ").capitalize()
    return {**members, "type": f"urn:braid:problem:{kind}", "title": title, "status": status, "detail": detail}


def slug(error: type[Exception]) -> str:
    """`ShapeMismatch` -> `shape-mismatch`."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "-", error.__name__).lower()


def _fields(error: Exception) -> dict[str, Any]:
    if not dataclasses.is_dataclass(error):
        return {}
    return {f.name: _plain(getattr(error, f.name)) for f in dataclasses.fields(error)}


def _plain(value: Any) -> Any:
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    return value if isinstance(value, int | float | str | None) else str(value)
