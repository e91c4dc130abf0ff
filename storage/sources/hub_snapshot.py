"""What is on a Hub, before a byte of it is read: a reference, the files at one commit, and the adapter among them.

All of it comes from strangers, a caller and a server, so it is checked here and made of plain values from here on.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Self

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # exported lazily, which mypy cannot see
from pydantic import BaseModel, Field, ValidationError

from storage.digest import Digest
from storage.errors import BadSource, HubUnavailable, NotAnAdapter, PickleOnly, SeveralAdapters

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
SINGLE_FILE = ".safetensors"  # how the name of an adapter without a config ends
PICKLES = ("adapter_model.bin", "adapter_model.pt", "pytorch_lora_weights.bin")

_DATASETS = "datasets/"  # no account of the Hub may be called so
_COMMIT = re.compile(r"[0-9a-f]{40}")
# The first character keeps out hidden files, `.`, `..`, options and the empty part; `%` and `\` are in no part at all.
_PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+=-]*")
_PATH_MAX_CHARS = 255
_LICENCE_MAX_CHARS = 200
_OF_MODELS = ("config.json", "model_index.json")


@dataclass(frozen=True, slots=True)
class HubRef:
    """A folder of a repository at a revision: a branch, a tag, `refs/pr/1` or a commit. `subfolder` is "" at the root.

    kind: as in the Hub's own addresses.  Of a model, the folder may instead be the path of one `.safetensors` file.

    Raises BadSource for anything that is not plainly such a name.
    """

    repo: str
    revision: str = "main"
    subfolder: str = ""
    kind: Literal["models", "datasets"] = "models"

    def __post_init__(self) -> None:
        if self.repo.count("/") != 1:
            raise BadSource(str(self), "write hub:org/name[/folder][@revision]")
        try:
            validate_repo_id(self.repo)
        except HFValidationError:
            raise BadSource(str(self), "the Hub allows no repository of that name") from None
        if self.subfolder and not _is_plain_path(self.subfolder):
            raise BadSource(str(self), "the folder is not a plain relative path")
        if not _is_plain_path(self.revision):
            raise BadSource(str(self), "the revision is not a plain branch, tag or commit")

    @classmethod
    def parse(cls, text: str) -> Self:
        """`[datasets/]org/name[/folder][@revision]`, the part after `hub:`."""
        place, at, revision = text.removeprefix(_DATASETS).partition("@")
        org, _, rest = place.partition("/")
        name, slash, subfolder = rest.partition("/")
        if slash and not subfolder:
            raise BadSource(f"hub:{text}", "the folder is empty")
        kind: Literal["models", "datasets"] = "datasets" if text.startswith(_DATASETS) else "models"
        return cls(f"{org}/{name}", revision if at else "main", subfolder, kind)

    @property
    def is_commit(self) -> bool:
        return _COMMIT.fullmatch(self.revision) is not None

    @property
    def is_file(self) -> bool:
        return self.kind == "models" and self.subfolder.endswith(SINGLE_FILE)

    def file(self, name: str) -> str:
        """Path in the repository of a file of this folder; of the file itself, if this is one."""
        if self.is_file:
            return self.subfolder
        return f"{self.subfolder}/{name}" if self.subfolder else name

    def __str__(self) -> str:
        kind = _DATASETS if self.kind == "datasets" else ""
        return f"hub:{kind}{self.repo}{self.subfolder and '/'}{self.subfolder}@{self.revision}"


@dataclass(frozen=True, slots=True)
class HubFile:
    """A file as the Hub announces it. One of the hashes is there: `sha256` for LFS files, `git_sha1` for small ones."""

    path: str
    size_bytes: int
    sha256: Digest | None = None
    git_sha1: str | None = None


@dataclass(frozen=True, slots=True)
class HubListing:
    """The files of a repository at one commit, those of `ref`'s folder by their name in it. Otherwise as HubSnapshot."""

    ref: HubRef
    restricted: bool
    names: Mapping[str, HubFile]


@dataclass(frozen=True, slots=True)
class HubSnapshot:
    """An adapter at one commit. `ref.revision`: 40 hexadecimal digits. `restricted`: gated or private.

    config: None of a single file.  base_model: as the card names it.
    """

    ref: HubRef
    restricted: bool
    licence: str | None
    config: HubFile | None
    weights: HubFile
    base_model: str | None = None


class _Lfs(BaseModel):
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    size: int = Field(ge=0)


class _Sibling(BaseModel):
    rfilename: str
    size: int | None = Field(None, ge=0)
    blob_id: str | None = Field(None, alias="blobId", pattern=r"^[0-9a-f]{40}$")
    lfs: _Lfs | None = None


class _Info(BaseModel):
    """What `/api/models/…` says, as far as it is needed. A repository that does not say so counts as private."""

    sha: str = Field(pattern=r"^[0-9a-f]{40}$")
    private: bool = True
    gated: bool | str = False
    siblings: tuple[_Sibling, ...]
    card: dict[str, Any] | None = Field(None, alias="cardData")


def read_snapshot(ref: HubRef, text: bytes) -> HubSnapshot:
    """The adapter at `ref` in the answer of `/api/models/…?blobs=true`, which holds a commit and the files at that commit.

    Raises PickleOnly, NotAnAdapter, SeveralAdapters; HubUnavailable if the answer is malformed or about another commit.
    """
    return _snapshot(ref, _parse(ref, text))


def read_listing(ref: HubRef, text: bytes) -> HubListing:
    """All files below `ref` in the same answer. Raises HubUnavailable, as `read_snapshot`."""
    info, folder = _parse(ref, text), ref.file("")
    files = [_announced(ref, sibling) for sibling in info.siblings if sibling.rfilename.startswith(folder)]
    names = {file.path.removeprefix(folder): file for file in files}
    return HubListing(replace(ref, revision=info.sha), _is_restricted(info), names)


def _parse(ref: HubRef, text: bytes) -> _Info:
    try:
        info = _Info.model_validate_json(text)
    except ValidationError:
        raise HubUnavailable(ref.repo, "its description of the repository was not understood") from None
    if ref.is_commit and info.sha != ref.revision:
        raise HubUnavailable(ref.repo, f"it answered for another commit than {ref.revision}")
    return info


def _is_restricted(info: _Info) -> bool:
    return info.private or bool(info.gated)


def _snapshot(ref: HubRef, info: _Info) -> HubSnapshot:
    files = {sibling.rfilename: sibling for sibling in info.siblings}
    weights, config = _adapter(ref, tuple(files))
    card = info.card or {}
    return HubSnapshot(
        ref=replace(ref, revision=info.sha),
        restricted=_is_restricted(info),
        licence=_licence(card),
        config=_announced(ref, files[config]) if config else None,
        weights=_announced(ref, files[weights]),
        base_model=_base_model(card),
    )


def _adapter(ref: HubRef, files: Sequence[str]) -> tuple[str, str | None]:
    """Paths of the weights and of the config, if there is one."""
    weights, config = ref.file(WEIGHTS), ref.file(CONFIG)
    if ref.is_file:
        if weights not in files:
            raise NotAnAdapter(ref.repo, weights)
        return weights, None
    single = _single_files(ref, files)
    if single and config not in files and weights not in files:
        if len(single) > 1:
            raise SeveralAdapters(ref.repo, tuple(single))
        return single[0], None
    pickles = [ref.file(name) for name in PICKLES if ref.file(name) in files]
    if weights not in files and pickles:
        raise PickleOnly(ref.repo, pickles[0])
    for path in (config, weights):
        if path not in files:
            raise NotAnAdapter(ref.repo, path)
    return weights, config


def _single_files(ref: HubRef, files: Sequence[str]) -> list[str]:
    """Adapters without a config, as image trainers share them: what lies in the folder itself, unless that holds a model."""
    if any(ref.file(name) in files for name in _OF_MODELS):
        return []
    folder = ref.file("")
    return [path for path in files if path.startswith(folder) and "/" not in path[len(folder) :] and path.endswith(SINGLE_FILE)]


def _announced(ref: HubRef, sibling: _Sibling) -> HubFile:
    # The blob_id of an LFS file is that of its pointer, not of its bytes.
    if sibling.lfs is not None:
        return HubFile(sibling.rfilename, sibling.lfs.size, sha256=Digest(sibling.lfs.sha256))
    if sibling.size is None or sibling.blob_id is None:
        raise HubUnavailable(ref.repo, f"it announces neither size nor hash of {sibling.rfilename}")
    return HubFile(sibling.rfilename, sibling.size, git_sha1=sibling.blob_id)


def _licence(card: Mapping[str, Any]) -> str | None:
    """The card's `license`, or its own name for one that is not on the Hub's list."""
    licence = card.get("license_name") if card.get("license") == "other" else None
    licence = licence or card.get("license")
    return licence[:_LICENCE_MAX_CHARS] if isinstance(licence, str) and licence else None


def _base_model(card: Mapping[str, Any]) -> str | None:
    """The card's `base_model`, where it names one."""
    named = card.get("base_model")
    only = named[0] if isinstance(named, list) and len(named) == 1 else named
    return only[:_PATH_MAX_CHARS] if isinstance(only, str) and only else None


def _is_plain_path(text: str) -> bool:
    parts = text.split("/")
    return len(text) <= _PATH_MAX_CHARS and ".." not in text and all(_PART.fullmatch(part) for part in parts)
