"""docs/kinds.md says what the code reads and refuses today."""

from kinds_page import PAGE, page


def test_the_page_is_what_the_code_says() -> None:
    assert PAGE.read_text() == page(), "run `python tests/formats/kinds_page.py`"
