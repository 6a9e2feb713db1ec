"""Pages of paragraphs."""

from storage.documents import PAGE_CHARS, pages


def test_pages_are_cut_between_paragraphs_only() -> None:
    paragraphs = [f"{index} " + "x" * 900 for index in range(20)] + ["", "   \n"]
    result = list(pages(paragraphs))
    assert "\n\n".join(result).split("\n\n") == paragraphs[:20]
    assert all(len(page) <= PAGE_CHARS for page in result)
    assert len(result) == 7, "3 paragraphs fit on a page"
    assert list(pages(["y" * 3 * PAGE_CHARS])) == ["y" * 3 * PAGE_CHARS], "a paragraph is never cut"
