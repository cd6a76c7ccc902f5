"""The chat page in a real browser, over a real server."""

import json
import re
import shutil
from contextlib import contextmanager

import pytest

pytest.importorskip("uvicorn")
selenium = pytest.importorskip("selenium")
if not (shutil.which("chromium") and shutil.which("chromedriver")):
    pytest.skip("needs chromium and chromedriver", allow_module_level=True)
from selenium import webdriver  # noqa: E402
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402
from selenium.webdriver.support.ui import WebDriverWait  # noqa: E402
from serving import serve  # noqa: E402

WAIT_S = 60
MARKDOWN = (
    "# One\n\nA **bold** `x < y` and <b>text</b>, [a link](https://example.org/a_b) and "
    "[none](javascript:alert(1)).\n\n- first\n- second\n  1. inner\n\n"
    "```python\nprint('<i>')\n```\n\n| a | b |\n| - | - |\n| 1 | 2 |\n\n> said\n"
)


@contextmanager
def browsed(size: str = "1200,900"):
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", f"--window-size={size}"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))
    try:
        yield browser
    finally:
        browser.quit()


@pytest.fixture(scope="module")
def served(templated, tmp_path_factory):
    with serve(templated, tmp_path_factory.mktemp("log") / "log", "--sequences", "2") as one:
        yield one


@pytest.fixture
def page(served):
    with browsed() as browser:
        browser.get(served.address)
        until(browser, lambda: browser.title == served.name)
        yield browser


def until(browser, holds):
    return WebDriverWait(browser, WAIT_S).until(lambda _: holds())


def one(browser, selector: str):
    return browser.find_element(By.CSS_SELECTOR, selector)


def texts(browser, selector: str) -> list[str]:
    """What is read there, at one moment: while an answer streams, elements come and go."""
    script = "return [...document.querySelectorAll(arguments[0])].map(its => its.innerText)"
    return browser.execute_script(script, selector)


def ask(browser, text: str, most: str = "12") -> None:
    field = one(browser, "#most")
    field.clear()
    field.send_keys(most)
    one(browser, "#message").send_keys(text, Keys.ENTER)


def answered(browser, count: int) -> list[str]:
    until(browser, lambda: one(browser, "#stop").get_attribute("hidden") is not None)
    until(browser, lambda: len(texts(browser, "li.assistant")) == count)
    return texts(browser, "li.assistant .said")


def test_a_conversation_streams_and_is_still_there_afterwards(page, served):
    ask(page, "import os")
    (first,) = answered(page, 1)
    counts = r"cut at the maximum of tokens; 12 tokens at [\d.]+ a second, 4\.00 of 4 experts"
    assert re.fullmatch(counts, texts(page, ".actions span")[0])
    ask(page, "and then?")
    answered(page, 2)
    page.refresh()
    until(page, lambda: page.title == served.name)
    assert answered(page, 2)[0] == first and texts(page, "li.user .said") == ["import os", "and then?"]
    assert texts(page, "#list li button:first-child") == ["import os"]
    page.find_element(By.ID, "new").click()
    assert texts(page, "#log li") == []
    page.find_element(By.CSS_SELECTOR, "#list button[aria-label^=Delete]").click()
    assert texts(page, "#list li") == [] and page.execute_script("return localStorage['edge-moe.talks']") == "[]"


def test_an_answer_is_stopped_retried_and_its_question_edited(page):
    ask(page, "def main(argv):", most="3000")
    until(page, lambda: "".join(texts(page, "li.assistant .said")))
    one(page, "body").send_keys(Keys.ESCAPE)
    until(page, lambda: "stopped" in "".join(texts(page, ".actions span")))
    field = one(page, "#most")
    field.clear()
    field.send_keys("5")
    next(its for its in page.find_elements(By.CSS_SELECTOR, ".actions button") if its.text == "Retry").click()
    until(page, lambda: "5 tokens" in "".join(texts(page, ".actions span")))
    next(its for its in page.find_elements(By.CSS_SELECTOR, ".actions button") if its.text == "Edit").click()
    assert one(page, "#message").get_attribute("value") == "def main(argv):" and texts(page, "#log li") == []


def test_markdown_becomes_elements_and_html_stays_text(page):
    """The text is put into the browser's history, as what a small random model says has no Markdown."""
    talk = {
        "id": "1",
        "messages": [{"role": "user", "content": "<img src=x>"}, {"role": "assistant", "content": MARKDOWN}],
    }
    page.execute_script("localStorage['edge-moe.talks'] = arguments[0]", json.dumps([talk]))
    page.refresh()
    until(page, lambda: texts(page, "#list li"))
    one(page, "#list li button").click()
    said = one(page, "li.assistant .said")
    assert [its.text for its in said.find_elements(By.CSS_SELECTOR, "h3, strong, a, th, td, blockquote")] == [
        "One", "bold", "a link", "a", "b", "1", "2", "said",
    ]  # fmt: skip
    assert said.find_element(By.TAG_NAME, "a").get_attribute("href") == "https://example.org/a_b"
    assert said.find_element(By.CSS_SELECTOR, "pre code").text == "print('<i>')"
    assert [its.text for its in said.find_elements(By.CSS_SELECTOR, "ul > li > ol > li")] == ["inner"]
    assert "<b>text</b>" in said.text and not page.find_elements(By.CSS_SELECTOR, ".said b, .said img, .said i")


def test_the_plots_show_what_the_server_counts(page, served):
    ask(page, "import os")
    answered(page, 1)
    captions = until(page, lambda: "–" not in "".join(texts(page, "figcaption b")[:2]) and texts(page, "figcaption b"))
    assert re.fullmatch(r"[\d.]+ [MG]B of [\d.]+ [MG]B|\d+ MB of [\d.]+ GB", captions[1]), captions
    assert page.find_element(By.CSS_SELECTOR, "figure path").get_attribute("d").startswith("M ")


def test_a_server_that_needs_a_key_asks_for_it(templated, tmp_path):
    with serve(templated, tmp_path / "log", "--api-key", "secret") as one_, browsed() as browser:
        browser.get(one_.address)
        until(browser, lambda: one(browser, "#key").is_displayed())
        assert "API key" in one(browser, "#state").text
        one(browser, "#key").send_keys("secret", Keys.TAB)
        until(browser, lambda: browser.title == one_.name)
        ask(browser, "import os")
        assert answered(browser, 1)


def test_on_a_phone_panels_open_over_the_chat_and_nothing_is_wider_than_the_screen(served):
    with browsed("390,800") as browser:
        browser.execute_cdp_cmd(
            "Emulation.setDeviceMetricsOverride", {"width": 390, "height": 800, "deviceScaleFactor": 2, "mobile": True}
        )
        browser.get(served.address)
        until(browser, lambda: browser.title == served.name)
        assert browser.execute_script("return document.documentElement.scrollWidth") == 390
        assert not one(browser, "#panel").is_displayed()
        one(browser, "#open-panel").click()
        assert one(browser, "#temperature").is_displayed()
        one(browser, "body").send_keys(Keys.ESCAPE)
        assert not one(browser, "#panel").is_displayed()
        one(browser, "#message").send_keys("import os")
        one(browser, "#send").click()
        until(browser, lambda: texts(browser, "li.assistant"))


def test_all_controls_are_reached_by_keyboard_and_named(page):
    seen = []
    one(page, "body").click()
    for _ in range(12):
        page.switch_to.active_element.send_keys(Keys.TAB)
        its = page.switch_to.active_element
        if its.tag_name == "body":  # from the last one to the first
            continue
        seen.append(its.get_attribute("id") or its.text)
        assert its.accessible_name, seen
    assert {"new", "message", "send", "system", "temperature", "most"} <= set(seen)


def test_nothing_is_asked_of_others_and_the_policy_is_kept(page, served):
    answer = served.get("/")
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    assert served.get("/page/page.js").headers["x-content-type-options"] == "nosniff"
    assert served.get("/page/../app.py").status_code == 404
    ask(page, "import os")
    answered(page, 1)
    asked = page.execute_script("return performance.getEntriesByType('resource').map(its => its.name)")
    assert asked and all(name.startswith(served.address) for name in asked if not name.startswith("data:"))
    assert [its for its in page.get_log("browser") if its["level"] == "SEVERE"] == []
