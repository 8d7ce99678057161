"A headless Chromium for the tests that look at pages as a reader does."
import shutil
from contextlib import contextmanager

import pytest

PROGRAM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
playwright = pytest.importorskip("playwright.sync_api")
needed = pytest.mark.skipif(PROGRAM is None, reason="needs Chromium or Chrome")


@contextmanager
def chromium(**options):
    "A browser context with these options (viewport, color_scheme). `context.complaints` has what goes wrong in its pages, `context.requests` what they ask for."
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=PROGRAM, args=["--no-sandbox", "--disable-gpu"])
        context = browser.new_context(**options)
        context.complaints, context.requests = [], []
        context.on("request", lambda request: context.requests.append(request.url))
        context.on("weberror", lambda error: context.complaints.append(str(error.error)))
        context.on("console", lambda message: context.complaints.append(message.text) if message.type == "error" else None)
        # what was still on its way when the page was left is no fault of the page
        context.on("requestfailed", lambda request: context.complaints.append(f"not loaded: {request.url}") if request.failure != "net::ERR_ABORTED" else None)
        yield context
        browser.close()
