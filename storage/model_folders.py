"""A base model as a directory, because that is what readers of models open: its files' own names as links to blobs.

Links are symbolic. A hard link would keep the bytes on the disk after garbage collection has counted them as freed, and it
fails where blobs lie on another filesystem; a symbolic one dangles, which is seen here and leads to an error with a name.
"""

import shutil
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from storage.base_files import own_name
from storage.blobs import BlobStore
from storage.digest import Descriptor, Digest
from storage.layout import Layout

_ORPHAN_AGE_S = 3600.0


def make_folder(layout: Layout, blobs: BlobStore, base: Digest, files: Mapping[str, Descriptor]) -> Path:
    """The directory of a base model, every file in it whole on return; any number of callers may make it at once.

    Each link appears by a rename, and all links of one name say the same, so nobody meets half of one.
    Raises BlobNotFound if a part is not in the store, and leaves no link to it.
    """
    folder = layout.model(base).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    targets = {folder / own_name(name): blobs.path(part.digest).absolute() for name, part in files.items()}
    for link, target in targets.items():
        if not (link.is_symlink() and link.readlink() == target):
            _link(layout.temp_link().absolute(), link, target)
    return folder


def sweep_folders(layout: Layout) -> int:
    """Remove the directories of base models whose blobs are gone, and links of killed processes; how many directories."""
    stale = [folder for folder in _folders(layout) if any(not file.exists() for file in folder.iterdir())]
    for folder in stale:
        shutil.rmtree(folder, ignore_errors=True)  # another sweep may be faster
    for orphan in layout.models.glob(Layout.temp_pattern):
        if orphan.is_symlink() and time.time() - orphan.lstat().st_mtime > _ORPHAN_AGE_S:
            orphan.unlink(missing_ok=True)
    return len(stale)


def _folders(layout: Layout) -> Iterator[Path]:
    if layout.models.is_dir():
        yield from (path for path in layout.models.iterdir() if path.is_dir() and not path.is_symlink())


def _link(temp: Path, link: Path, target: Path) -> None:
    temp.symlink_to(target)
    try:
        temp.replace(link)
    finally:
        temp.unlink(missing_ok=True)
