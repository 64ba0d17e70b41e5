"""The page at / in headless Chromium: a person types, reads, stops and is told of mistakes.

Asserts on text, not on pixels. Skipped where chromium or its driver is not installed.
"""

import os
import shutil

import pytest
from conftest import CHAT, PROMPT, run
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="there is no chromium with chromedriver")


@pytest.fixture(scope="module")
def browser():
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for word in ["--headless=new", "--disable-gpu", "--disable-dev-shm-usage", "--window-size=1100,800"]:
        options.add_argument(word)
    if os.geteuid() == 0:
        options.add_argument("--no-sandbox")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield browser
    browser.quit()


class Page:
    """The page of a server, by the ids of its parts."""

    def __init__(self, browser, root, model="demo"):
        self.browser = browser
        browser.get(root)
        self.wait(lambda: model in self.text("model"))

    def part(self, name):
        return self.browser.find_element(By.ID, name)

    def text(self, name):
        return self.part(name).text

    def texts(self, kind):
        """Texts as they stand in the page, line ends included, in one call: there may be thousands."""
        script = "return [...document.querySelectorAll(arguments[0])].map((part) => part.textContent)"
        return self.browser.execute_script(script, kind)

    def wait(self, condition):
        WebDriverWait(self.browser, 30, 0.05).until(lambda _: condition())

    def set(self, **fields):
        script = "document.getElementById(arguments[0]).value = arguments[1]"
        for name, value in fields.items():
            self.browser.execute_script(script, name, str(value))

    def send(self, text, keys=Keys.ENTER):
        self.part("prompt").clear()
        self.part("prompt").send_keys(text, keys)

    def written(self):
        """What the model wrote last, when it has ended."""
        self.wait(lambda: self.part("send").is_enabled())
        return "".join(self.texts("#log article:last-child .token"))


@pytest.fixture
def page(browser, server):
    page = Page(browser, server.root)
    yield page
    # A refused style or script, an exception, a missing file.
    said = [line["message"] for line in browser.get_log("browser") if line["level"] == "SEVERE"]
    assert [line for line in said if "400 (Bad Request)" not in line and "/tokenizer_info" not in line] == []


def test_a_prompt_is_continued_and_the_strip_lives(page):
    page.set(max_tokens=60, temperature=0)
    page.send(PROMPT)
    expected = run("demo", PROMPT, "--max-tokens", 60)["text"]
    assert page.written() == expected
    assert page.texts("#log .prompt") == [PROMPT]
    assert page.text("status").startswith("60 tokens")
    assert float(page.text("speed")) > 0
    page.wait(lambda: page.text("queue") == "0 run, 0 wait")
    kinds = {"token drafted", "token corrected", "token bonus", "token plain"}
    classes = page.browser.find_elements(By.CSS_SELECTOR, "#log .token")
    assert {token.get_attribute("class") for token in classes} <= kinds


def test_guessed_tokens_are_coloured_and_counted(browser, start):
    # A fixed length drafts whether or not that pays here.
    page = Page(browser, start("--draft-tokens", 4).root)
    page.set(max_tokens=200, temperature=0)
    page.send(PROMPT)
    page.written()
    assert page.texts(".token.drafted") and page.texts("#log .token.corrected") and page.texts("#log .token.bonus")
    assert 1 < float(page.text("length")) <= 5 and 0 < float(page.text("acceptance")) < 1
    assert page.part("chart").get_attribute("aria-label").startswith("acceptance " + page.text("acceptance"))
    assert len(page.part("curve").get_attribute("points").split()) > 2
    colour = "return getComputedStyle(document.querySelector('#log .token.drafted')).backgroundColor"
    coloured = browser.execute_script(colour)
    page.part("colours").click()
    assert browser.execute_script(colour) != coloured


def test_a_conversation_goes_on(browser, start):
    page = Page(browser, start(CHAT, "--served-model-name", "chat", "--api-key", "sesame").root, "asks for a key")
    page.browser.execute_script("document.querySelector('details').open = true")
    page.part("key").send_keys("sesame", Keys.TAB)
    page.wait(lambda: page.text("model") == "chat")
    page.set(mode="chat", max_tokens=8, temperature=0)
    page.send("Say something.")
    first = page.written()
    page.send("And again.")
    second = page.written()
    assert page.texts("#log h2") == ["You", "chat", "You", "chat"] and first and second
    # The key is this tab's: a reload asks for none.
    page.browser.refresh()
    page.wait(lambda: page.text("model") == "chat")
    browser.get_log("browser")


def test_control_enter_sends_and_shift_enter_begins_a_line(page):
    page.set(max_tokens=3)
    page.send("fn a() {" + Keys.SHIFT + Keys.ENTER + Keys.NULL + "let", Keys.CONTROL + Keys.ENTER)
    page.written()
    assert page.texts("#log .prompt") == ["fn a() {\nlet"]


def test_escape_stops_and_frees_the_place(page):
    page.set(max_tokens=1900, temperature=0)
    page.send(PROMPT)
    page.wait(lambda: len(page.texts("#log .token")) > 5)
    page.wait(lambda: page.text("queue").startswith("1 run"))
    page.part("prompt").send_keys(Keys.ESCAPE)
    page.written()
    assert page.text("status").endswith("stopped")
    page.wait(lambda: page.text("queue") == "0 run, 0 wait")
    page.part("clear").click()
    assert page.texts("#log article") == []


def test_a_mistake_is_told_and_html_stays_text(page):
    page.set(temperature=-1)
    page.send("<img src=x onerror=alert(1)><b>bold</b>")
    page.wait(lambda: page.text("status") == "failed")
    assert "temperature" in page.texts("#log article.failed")[0]
    assert page.texts("#log .prompt") == ["<img src=x onerror=alert(1)><b>bold</b>"]
    assert page.browser.find_elements(By.CSS_SELECTOR, "#log img, #log b") == []


def test_a_narrow_screen_needs_no_sideways_scrolling(page):
    page.browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride",
                                 {"width": 320, "height": 600, "deviceScaleFactor": 1, "mobile": False})
    widths = page.browser.execute_script("return [document.documentElement.scrollWidth, innerWidth]")
    page.browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    assert widths[0] <= widths[1] == 320


def test_dark_mode_is_dark_and_every_field_has_a_label(page):
    script = "return getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)"
    grounds = {}
    for scheme in ["light", "dark"]:
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        page.browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        grounds[scheme] = page.browser.execute_script(script)
    assert max(grounds["dark"]) < 60 and min(grounds["light"]) > 200, grounds
    # What is folded away has no name.
    page.browser.execute_script("document.querySelector('details').open = true")
    fields = page.browser.find_elements(By.CSS_SELECTOR, "input, select, textarea")
    unnamed = [field.get_attribute("id") for field in fields if not field.accessible_name]
    assert len(fields) > 8 and unnamed == []
