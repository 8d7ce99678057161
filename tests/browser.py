"A headless Chromium for the tests that look at pages as a reader sees them."
import shutil
from contextlib import contextmanager

import pytest

PROGRAM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
playwright = pytest.importorskip("playwright.sync_api")
needed = pytest.mark.skipif(PROGRAM is None, reason="needs Chromium or Chrome")


@contextmanager
def chromium(**options):
    """A browser context with these options (viewport, color_scheme).

    `context.complaints` lists what goes wrong in its pages, `context.requests` what they ask for.
    """
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=PROGRAM, args=["--no-sandbox", "--disable-gpu"])
        context = browser.new_context(**options)
        context.complaints, context.requests = [], []
        context.on("request", lambda request: context.requests.append(request.url))
        context.on("weberror", lambda error: context.complaints.append(str(error.error)))
        def complain_of_console(message):
            if message.type == "error": context.complaints.append(message.text)
        def complain_of_request(request):
            # a request that was cut off because we left the page is not the page's fault
            if request.failure != "net::ERR_ABORTED": context.complaints.append(f"not loaded: {request.url}")
        context.on("console", complain_of_console)
        context.on("requestfailed", complain_of_request)
        yield context
        browser.close()
