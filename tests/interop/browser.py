"""Chromium without a window, in which pages are looked at as their readers do."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

NAMES = ("chromium", "chromium-browser", "google-chrome")


@contextmanager
def chromium() -> Iterator["Browser"]:
    """The browser of this machine; a test is skipped where there is none."""
    playwright = pytest.importorskip("playwright.sync_api").sync_playwright
    found = next(filter(None, map(shutil.which, NAMES)), None)
    if found is None:
        pytest.skip("there is no chromium here")
    rights = ["--no-sandbox"] if os.geteuid() == 0 else []  # it refuses root otherwise
    with playwright() as started:
        browser = started.chromium.launch(executable_path=found, args=rights)
        try:
            yield browser
        finally:
            browser.close()


@contextmanager
def opened(
    browser: "Browser", file: Path, width: int = 1400, scheme: Any = "light"
) -> Iterator["Page"]:
    """A page once all of its pictures are drawn.

    At the end nothing may have been said on its console, and nothing asked for beside its file.
    """
    size: Any = {"width": width, "height": 1000}
    context = browser.new_context(viewport=size, color_scheme=scheme)
    page, heard = context.new_page(), []
    page.on("console", lambda message: heard.append(f"{message.type}: {message.text}"))
    page.on("pageerror", lambda error: heard.append(f"error: {error}"))
    page.on("dialog", lambda dialog: heard.append(f"dialog: {dialog.message}"))
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.goto(file.absolute().as_uri())
    page.locator("body[data-drawn]").wait_for(state="attached")
    yield page
    assert heard == [], heard
    assert [url for url in asked if not url.startswith("data:")] == [file.absolute().as_uri()]
    context.close()


FAINT = """() => {
  const pen = new OffscreenCanvas(1, 1).getContext("2d", { willReadFrequently: true });
  const painted = (layers) => {
    for (const [colour, alpha] of layers) {
      pen.fillStyle = colour;
      pen.globalAlpha = alpha;
      pen.fillRect(0, 0, 1, 1);
    }
    return [...pen.getImageData(0, 0, 1, 1).data].slice(0, 3);
  };
  const linear = (part) => (part <= 10.31 ? part / 3294.6 : ((part / 255 + 0.055) / 1.055) ** 2.4);
  const light = ([red, green, blue]) =>
    0.05 + 0.2126 * linear(red) + 0.7152 * linear(green) + 0.0722 * linear(blue);
  const found = [];
  for (const each of document.querySelectorAll("body, body *")) {
    const texts = [...each.childNodes].filter((node) => node.nodeType === Node.TEXT_NODE);
    const text = texts.map((node) => node.data.trim()).join("");
    if (!text || !each.checkVisibility() || each.closest("script, :disabled, [disabled]")) continue;
    const layers = [];
    let alpha = 1;
    for (let at = each; at; at = at.parentElement) {
      const style = getComputedStyle(at);
      layers.unshift([style.backgroundColor, 1]);
      alpha *= style.opacity;
    }
    const style = getComputedStyle(each);
    const ink = each instanceof SVGElement ? style.fill : style.color;
    const [low, high] = [layers, [...layers, [ink, alpha]]]
      .map((each) => light(painted([["white", 1], ...each])))
      .sort((one, other) => one - other);
    if (high / low < 4.5) found.push(`${text.slice(0, 40)}: ${(high / low).toFixed(2)}`);
  }
  return found;
}"""


def faint(page: "Page") -> list[str]:
    """Texts that stand out less than 4.5 to one from what lies behind them, as WCAG 2 has it."""
    found: list[str] = page.evaluate(FAINT)
    return found
