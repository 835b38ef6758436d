"""The built-in page, in a browser: what it asks for, what it shows, and that it needs nothing from elsewhere."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from engine_cases import write_model
from serve_cases import Running, serving, slow_down, wait_for

from fastsft.engine.llm import LLM
from fastsft.engine.request import SamplingParams

if TYPE_CHECKING:
    from playwright.sync_api import Page

NAMES = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
BROWSER = os.environ.get("FASTSFT_BROWSER") or next(filter(None, map(shutil.which, NAMES)), None)
needs_browser = pytest.mark.skipif(BROWSER is None, reason=f"no browser: none of {', '.join(NAMES)}")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("paged") / "llama", "llama")


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Running]:
    with serving(folder, settings={"api_keys": ("secret",)}) as running:
        yield running


@pytest.fixture
def page(server: Running) -> Iterator[Page]:
    """The page with its key given; what it asks others for, and what it complains about, fails the test."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        page = browser.new_page()
        elsewhere, complaints = [], []
        page.on("request", lambda r: None if r.url.startswith((server.url, "data:")) else elsewhere.append(r.url))
        page.on("console", lambda m: complaints.append(m.text) if m.type == "error" else None)
        page.on("pageerror", lambda e: complaints.append(str(e)))
        page.goto(server.url)
        page.fill("#key", "secret")
        page.dispatch_event("#key", "change")
        page.fill("#tokens", "12")
        yield page
        browser.close()
        assert elsewhere == []
        refused = re.compile(r"responded with a status of 40[01] ")  # what the browser says of any such answer
        assert [text for text in complaints if not refused.search(text)] == []


def shows(page: Page, status: str) -> None:
    from playwright.sync_api import expect

    expect(page.locator("#send")).to_be_enabled()
    expect(page.locator("#status")).to_have_text(re.compile(status))


@needs_browser
def test_chat(page: Page, folder: Path) -> None:
    llm = LLM(folder, num_blocks=64)
    page.get_by_text("· tiny").wait_for()
    messages = []
    for text in ("the cat", "<b>on the mat</b>"):  # what models and users write is text, no HTML
        messages.append({"role": "user", "content": text})
        expected = llm.chat(messages, SamplingParams(max_tokens=12))[0].outputs[0].text
        messages.append({"role": "assistant", "content": expected})
        page.fill("#message", text)
        page.press("#message", "Control+Enter")
        shows(page, r"\d+ events in")
        turns = page.locator(".turn").all()
        assert [t.evaluate("e => e.textContent") for t in turns] == [m["content"] for m in messages]
    page.click("#clear")
    assert page.locator(".turn").count() == 0


@needs_browser
def test_infill(page: Page, folder: Path) -> None:
    expected = LLM(folder, num_blocks=64).infill("the ", " mat", SamplingParams(max_tokens=12)).outputs[0].text
    page.click("#tab-infill")
    assert not page.is_visible("#chat")
    page.fill("#before", "the ")
    page.fill("#after", " mat")
    page.click("#fill")
    shows(page, r"\d+ events in")
    assert page.locator("#filled mark").evaluate("e => e.textContent") == expected
    assert page.locator("#filled").evaluate("e => e.textContent") == f"the {expected} mat"


@needs_browser
def test_errors_are_shown(page: Page) -> None:
    page.click("#tab-infill")
    page.fill("#key", "wrong")
    page.click("#fill")
    shows(page, "expected a valid API key")
    assert page.is_enabled("#fill")


@needs_browser
def test_a_message_that_was_refused_can_be_changed(page: Page) -> None:
    long = "the cat " * 300
    page.fill("#message", long)
    page.click("#send")
    shows(page, "leave no room")
    assert page.input_value("#message") == long
    assert page.locator(".turn").count() == 0
    page.fill("#message", "the cat")
    page.click("#send")
    shows(page, r"\d+ events in")
    assert page.locator(".turn").count() == 2


@needs_browser
def test_stop(folder: Path) -> None:
    from playwright.sync_api import sync_playwright

    with serving(folder) as server, sync_playwright() as playwright:
        slow_down(server.core, 0.05)
        browser = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        page = browser.new_page()
        page.goto(server.url)
        page.fill("#tokens", "200")
        page.fill("#temperature", "1")
        page.fill("#message", "a")
        page.click("#send")
        wait_for(lambda: server.core.stats().generated_tokens > 0)
        page.click("#stop")
        shows(page, "^stopped$")
        wait_for(server.settled)
        browser.close()


def test_the_page_needs_nothing_from_elsewhere(server: Running) -> None:
    response = server.http.get("/", headers={"Authorization": ""})
    assert response.status_code == 200
    policy = response.headers["content-security-policy"]
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe" not in policy
    assert not re.search(r"(src|href)=\"(?!data:)|https?:|\bimport\b|@import|url\(|innerHTML", response.text)
    assert not re.search(r"\son\w+=|style=", response.text)  # the policy would forbid it
