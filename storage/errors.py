"""What can go wrong with bytes. Each error carries its data and makes its own sentence.

StorageError
├── BadDigest            the text is not sha256:<64 hex digits>
├── BlobNotFound         no blob of that digest is in the store
├── DigestMismatch       bytes arrived that are not the bytes that were promised
├── BlobTooLarge         more bytes arrived than the caller allows
├── StoreFull            the disk, quota or file-size limit is reached
├── InvalidTensorFile    not a well-formed, harmless safetensors file
├── BadSource            the text is not a source reference
├── NoBaseModel          files that make no base model: no weights that are read here, an incomplete set, no config
└── HubError
    ├── RepoNotFound     no such repository, or it is private
    ├── RevisionNotFound no such branch, tag or commit
    ├── GatedRepo        the repository wants a token that was accepted there
    ├── PickleOnly       weights exist, but only as pickle
    ├── NotAnAdapter     the repository holds no adapter_config.json with weights beside it, and no single file
    ├── SeveralAdapters  the repository holds several single files, each an adapter
    ├── HubUnavailable   the Hub did not answer, or not in time
    └── TokenRefused     the token passed is no token of this Hub, or lacks the permission
"""

from dataclasses import dataclass


class StorageError(Exception):
    """Root of the tree; never raised itself."""


@dataclass(eq=False)
class BadDigest(StorageError):
    text: str

    def __str__(self) -> str:
        return f"{self.text[:100]!r} is not a digest; write sha256: and 64 lower-case hexadecimal digits"


@dataclass(eq=False)
class BlobNotFound(StorageError):
    digest: str

    def __str__(self) -> str:
        return f"no blob {self.digest} is in the store"


@dataclass(eq=False)
class DigestMismatch(StorageError):
    expected: str
    got: str

    def __str__(self) -> str:
        return f"expected bytes of {self.expected}, but received {self.got}"


@dataclass(eq=False)
class BlobTooLarge(StorageError):
    limit_bytes: int

    def __str__(self) -> str:
        return f"more than the {self.limit_bytes} bytes allowed"


@dataclass(eq=False)
class StoreFull(StorageError):
    reason: str

    def __str__(self) -> str:
        return f"the store cannot take more bytes: {self.reason}"


@dataclass(eq=False)
class InvalidTensorFile(StorageError):
    reason: str
    tensor: str | None = None

    def __str__(self) -> str:
        where = "" if self.tensor is None else f" (tensor {self.tensor[:200]!r})"
        return f"not a valid safetensors file: {self.reason}{where}"


@dataclass(eq=False)
class BadSource(StorageError):
    text: str
    reason: str

    def __str__(self) -> str:
        return f"{self.text[:200]!r} is not a source: {self.reason}"


@dataclass(eq=False)
class NoBaseModel(StorageError):
    source: str
    reason: str

    def __str__(self) -> str:
        return f"{self.source[:200]} is no base model that can be read: {self.reason}"


@dataclass(eq=False)
class HubError(StorageError):
    """Root of what a Hub can answer; `repo` as the caller wrote it."""

    repo: str


@dataclass(eq=False)
class RepoNotFound(HubError):
    def __str__(self) -> str:
        return f"{self.repo} was not found on the Hub; if it is private, pass a token that may read it"


@dataclass(eq=False)
class RevisionNotFound(HubError):
    revision: str

    def __str__(self) -> str:
        return f"{self.repo} has no revision {self.revision[:100]!r}"


@dataclass(eq=False)
class GatedRepo(HubError):
    def __str__(self) -> str:
        return f"{self.repo} is gated; accept its terms on the Hub and pass a token of that account"


@dataclass(eq=False)
class PickleOnly(HubError):
    file: str

    def __str__(self) -> str:
        return f"{self.repo} offers its weights only as a pickle ({self.file[:100]}), which is never opened; it needs safetensors"


@dataclass(eq=False)
class NotAnAdapter(HubError):
    missing: str

    def __str__(self) -> str:
        return f"{self.repo} is not a PEFT adapter: it has no {self.missing}"


@dataclass(eq=False)
class SeveralAdapters(HubError):
    files: tuple[str, ...]

    def __str__(self) -> str:
        listed = ", ".join(self.files)[:1000]
        return f"{self.repo} holds several adapters ({listed}); name one, as hub:{self.repo}/{self.files[0][:200]}"


@dataclass(eq=False)
class HubUnavailable(HubError):
    reason: str

    def __str__(self) -> str:
        return f"the Hub could not serve {self.repo}: {self.reason}"


@dataclass(eq=False)
class TokenRefused(HubError):
    def __str__(self) -> str:
        return f"the Hub refused the token passed for {self.repo}; pass a valid one that may read it, or none"
