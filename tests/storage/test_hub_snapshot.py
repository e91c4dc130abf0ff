"""References to a Hub: what is one, and what is refused before any request."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from storage.errors import BadSource
from storage.sources.hub import HubRef

name = st.from_regex(r"[A-Za-z0-9]{1,12}", fullmatch=True)
part = st.from_regex(r"[A-Za-z0-9_][A-Za-z0-9_+=-]{0,12}", fullmatch=True)
path = st.lists(part, min_size=1, max_size=4).map("/".join)


@given(name, name, st.just("") | path, path)
def test_a_reference_reads_back_what_it_writes(org: str, repo: str, subfolder: str, revision: str) -> None:
    ref = HubRef(f"{org}/{repo}", revision, subfolder)
    assert HubRef.parse(str(ref).removeprefix("hub:")) == ref


@given(st.text("aZ9_-./@\\%~: \n\0é", max_size=24).map("org/name{}".format) | st.text(max_size=60))
def test_any_text_is_a_plain_reference_or_refused(text: str) -> None:
    try:
        ref = HubRef.parse(text)
    except BadSource:
        return
    parts = re.split("/", f"{ref.repo}/{ref.subfolder or 'root'}/{ref.revision}")
    assert all(re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.+=-]*", part) and ".." not in part for part in parts)


def test_the_default_revision_is_main() -> None:
    assert HubRef.parse("org/name") == HubRef("org/name", "main", "")


def test_a_folder_and_a_revision_with_slashes_are_told_apart() -> None:
    assert HubRef.parse("org/name/a/b@refs/pr/1") == HubRef("org/name", "refs/pr/1", "a/b")


BAD_PARTS = [
    "..",
    ".",
    "a/../b",
    "a//b",
    "/a",
    "a/",
    ".git",
    "a/.hidden",
    "a\\b",
    "a\0b",
    "%2e%2e",
    "a%2Fb",
    "a\nb",
    "é",
    " a",
    "a..b",
]


@pytest.mark.parametrize("bad", [*BAD_PARTS, "x" * 300, ""])
def test_a_folder_that_is_not_a_plain_path_is_refused(bad: str) -> None:
    with pytest.raises(BadSource):
        HubRef.parse(f"org/name/{bad}")


@pytest.mark.parametrize("bad", [*BAD_PARTS, "x" * 300, "", "a@b", "-x"])
def test_a_revision_that_is_not_a_plain_name_is_refused(bad: str) -> None:
    with pytest.raises(BadSource):
        HubRef.parse(f"org/name@{bad}")


@pytest.mark.parametrize(
    "bad", ["", "name", "/name", "org/", "-org/name", "org/na--me", "org/name.git", "o..g/name", "o%2e/name", "x" * 97 + "/n"]
)
def test_a_repository_name_the_hub_would_not_allow_is_refused(bad: str) -> None:
    with pytest.raises(BadSource):
        HubRef.parse(bad)
