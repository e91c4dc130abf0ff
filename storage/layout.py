"""Where everything lies under the data directory. Nothing else in the project builds a store path."""

import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from storage.digest import Digest
from storage.errors import BadDigest


@dataclass(frozen=True, slots=True)
class Layout:
    """The tree below `root`. Only computes paths: touches no disk.

    root/
    ├── blobs/sha256/
    │   ├── .incoming/
    │   │   └── .tmp-<32 random hex>     being written, or left by a killed writer
    │   └── 00/ … ff/                    the first 2 hex digits of the blobs inside
    │       └── <64 hex>                 one blob, mode 0444
    ├── models/
    │   ├── .tmp-<32 random hex>         a link being made, or left by a killed process
    │   └── <64 hex>/                    a base model as a directory: links to blobs; from its manifest at any time
    ├── index.sqlite                     names, results, lineage
    ├── jobs.sqlite                      DBOS
    └── locks/                           lock files

    A blob's own directory follows from its digest, which is known only after the last byte; so bytes arrive
    in `.incoming/`, which is on the same filesystem, and the rename that publishes them stays atomic.
    """

    temp_pattern: ClassVar[str] = ".tmp-*"

    root: Path

    @property
    def blobs(self) -> Path:
        return self.root / "blobs" / "sha256"

    @property
    def incoming(self) -> Path:
        return self.blobs / ".incoming"

    @property
    def index(self) -> Path:
        return self.root / "index.sqlite"

    @property
    def jobs(self) -> Path:
        return self.root / "jobs.sqlite"

    @property
    def locks(self) -> Path:
        return self.root / "locks"

    @property
    def models(self) -> Path:
        return self.root / "models"

    def model(self, base: Digest) -> Path:
        return self.models / base.hex

    def blob(self, digest: Digest) -> Path:
        return self.blobs / digest.hex[:2] / digest.hex

    def digest_at(self, path: Path) -> Digest | None:
        """The inverse of `blob`; None for a path that is no blob's."""
        try:
            digest = Digest(path.name)
        except BadDigest:
            return None
        return digest if self.blob(digest) == path else None

    def temp(self) -> Path:
        """A new name in `incoming` at every call."""
        return self.incoming / self._temp_name()

    def temp_link(self) -> Path:
        """The same in `models`."""
        return self.models / self._temp_name()

    def _temp_name(self) -> str:
        return self.temp_pattern.replace("*", secrets.token_hex(16))
