"""A headless Chromium for tests."""

import shutil
from contextlib import contextmanager

import pytest


@contextmanager
def open_browser():
    """Launch Chromium. The test is skipped where playwright or Chromium is absent."""
    playwright = pytest.importorskip("playwright.sync_api")
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if path is None:
        pytest.skip("no Chromium")
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()
