"""The page at `/`, as a person sees it: in a real browser."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.conformance.served import KEY, MODEL_ID, PROMPTS, Served

pytestmark = pytest.mark.slow

TEXTS = [
    "How do I reset my password?",
    "I forgot my login credentials.",
    "Portugal has warm Decembers.",
    "The weather in Lisbon is mild in winter.",
    '<b>not bold</b> & "quoted"',
]
PROGRAMS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    program = next(filter(None, map(shutil.which, PROGRAMS)), None)
    if not program:
        pytest.skip("needs Chromium, which is no Python package: apt-get install chromium")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        # Root has no sandbox; nothing but our own page is opened.
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield browser
        browser.close()


class Visit:
    """The page, what it asks for and what it complains of."""

    def __init__(self, browser: Any, url: str) -> None:
        self.page = browser.new_page(viewport={"width": 1000, "height": 1300})
        self.page.set_default_timeout(20_000)
        self.asked: list[str] = []
        self.complaints: list[str] = []
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.goto(url)

    def compare(self, texts: list[str], *, key: str = KEY, dimensions: str = "", prompt: str = "") -> None:
        """Fill the form, press the button, and wait until it has done."""
        self.page.get_by_label("Texts, one a line").fill("\n".join(texts))
        self.page.get_by_label("Dimensions").fill(dimensions)
        self.page.get_by_label("Prompt").select_option(prompt)
        self.page.get_by_label("API key").fill(key)
        with self.page.expect_response("**/v1/embeddings"):
            self.page.get_by_role("button", name="Compare").click()
        self.page.wait_for_selector("#compare:enabled")

    def similarities(self) -> np.ndarray:
        """The heat map's numbers."""
        rows = self.page.locator("#map tbody tr").all()
        return np.array([[float(number) for number in row.locator("td").all_inner_texts()] for row in rows])

    def neighbours(self) -> list[list[tuple[str, float]]]:
        """Of each text, the nearest ones and how near they are."""
        rows = [row.locator(".line").all() for row in self.page.locator("#near tr").all()]
        return [[self._neighbour(line) for line in row] for row in rows]

    @staticmethod
    def _neighbour(line: Any) -> tuple[str, float]:
        score, _, text = line.locator("> span").all()
        return text.inner_text(), float(score.inner_text())


@pytest.fixture
def visit(browser: Any, served: Served) -> Iterator[Visit]:
    visit = Visit(browser, served.url)
    yield visit
    visit.page.close()


def cosines(vectors: np.ndarray) -> np.ndarray:
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    return unit @ unit.T


def test_similarities_and_neighbours_are_shown(visit: Visit, served: Served, tmp_path: Path):
    assert visit.page.get_by_role("heading", level=1).inner_text() == MODEL_ID
    assert not visit.page.locator("#result").is_visible()
    visit.compare(TEXTS)
    visit.page.screenshot(path=tmp_path / "page.png", full_page=True)

    expected = cosines(served.encoder.encode(TEXTS))
    np.testing.assert_allclose(visit.similarities(), expected, atol=0.0051)  # two digits are shown
    assert [row.rstrip() for row in visit.page.locator("#map tbody th").all_inner_texts()][4].endswith(TEXTS[4])
    for place, near in enumerate(visit.neighbours()):
        others = [other for other in np.argsort(-expected[place]) if other != place][:3]
        assert [text for text, _ in near] == [TEXTS[other] for other in others]
        np.testing.assert_allclose([score for _, score in near], expected[place, others], atol=0.00051)
    assert shade(visit, 0, 1) != shade(visit, 0, 2) and shade(visit, 0, 1) == shade(visit, 1, 0)
    tokens = sum(map(len, served.encoder.tokenize(TEXTS)))
    assert visit.page.locator("#time").inner_text().startswith(f"5 texts, {tokens} tokens, 384 dimensions: ")
    assert not visit.complaints
    assert visit.asked == [f"{served.url}/", f"{served.url}/v1/embeddings"]  # nothing from elsewhere
    assert (tmp_path / "page.png").stat().st_size > 10_000


def test_prompt_and_dimensions(visit: Visit, served: Served):
    visit.compare(TEXTS, dimensions="64", prompt="query")
    expected = cosines(served.encoder.encode(TEXTS, prompt=PROMPTS["query"])[:, :64])
    np.testing.assert_allclose(visit.similarities(), expected, atol=0.0051)
    assert not visit.complaints


def test_an_error_is_said_and_can_be_mended(visit: Visit, served: Served):
    error = visit.page.get_by_role("alert")
    visit.compare(TEXTS, key="")
    assert "give a valid API key" in error.inner_text() and not visit.page.locator("#result").is_visible()
    visit.compare(TEXTS, key="wrong")
    assert "give a valid API key" in error.inner_text()
    visit.compare([])
    assert "empty" in error.inner_text()
    visit.compare(TEXTS, dimensions="385")
    assert "384" in error.inner_text()
    visit.compare(TEXTS)
    assert not error.inner_text() and visit.similarities().shape == (5, 5)
    assert all("Failed to load resource" in complaint for complaint in visit.complaints)  # the browser's, of 4xx


def test_control_and_enter_compare_too(visit: Visit):
    visit.page.get_by_label("API key").fill(KEY)
    visit.page.get_by_label("Texts, one a line").press("Control+Enter")
    visit.page.wait_for_selector("#result:visible")
    assert len(visit.neighbours()) == 6 and not visit.complaints


def shade(visit: Visit, row: int, column: int) -> str:
    cell = visit.page.locator("#map tbody tr").nth(row).locator("td").nth(column)
    return cell.evaluate("cell => getComputedStyle(cell).backgroundColor")
