"""The site of `make docs` as its reader finds it, in a real browser: formulas, search, dark mode, a phone.

And what no page may have: a broken link, a picture without a description, a raw directive.
"""
import re
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

pytest.importorskip("smalldocs")
from browser import chromium, needed, playwright
from scripts import run_script

ROOT = Path(__file__).parent.parent


class Silent(SimpleHTTPRequestHandler):
    def log_message(self, *args): pass


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    "The folder of the finished pages. Broken links between pages end the build."
    folder = tmp_path_factory.mktemp("built")/"site"
    run_script("docs.py", folder, cwd=ROOT)
    return folder


@pytest.fixture(scope="module")
def address(site):
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Silent, directory=site))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def set_formulas(page):
    "Waits until KaTeX has set every formula."
    all_set = "[...document.querySelectorAll('.math')].every(m => m.querySelector('.katex'))"
    page.wait_for_function(f"() => {all_set}")


def visit_all(page, address, site):
    "Opens every page of the site in turn, and yields its name."
    for path in site.glob("*.html"):
        page.goto(f"{address}/{path.name}")
        yield path.stem


def pages(site): return {path.stem: path.read_text(encoding="utf-8") for path in site.glob("*.html")}


def test_every_notebook_has_a_page(site):
    names = {re.sub(r"^\d\d[a-z]?_", "", path.stem) for path in (ROOT/"nbs").glob("*.ipynb")}
    assert names == pages(site).keys()


def test_links_into_pages(site):
    "Every link with a # leads to an anchor that exists."
    found = pages(site)
    ids = {name: set(re.findall(r'\bid="([^"]+)"', page)) for name, page in found.items()}
    link = re.compile(r'<a [^>]*href="(?:\./)?(?:(\w+)\.html)?#([^"]+)"')
    links = [(name, target or name, anchor)
             for name, page in found.items() for target, anchor in link.findall(page)]
    assert len(links) > 500
    assert not [link for link in links if link[2] not in ids.get(link[1], ())]


def test_every_picture_has_words(site):
    seen = 0
    for name, page in pages(site).items():
        tags = re.findall(r"<img[^>]*>", page[page.index("<main"):page.index("</main>")])
        seen += len(tags)
        silent = [tag for tag in tags if not re.search(r'alt="[^"]{10,}"', tag)]
        first = silent[0][-80:] if silent else ""
        assert not silent, f"{name}: {len(silent)} pictures without a description, the first is {first}"
    assert seen > 200


def test_no_directive_is_left(site):
    for name, page in pages(site).items(): assert not re.findall(r"(?m)^(?:<[^>]+>)*#\s*\|.*", page), name


def test_functions_lead_to_their_source(site):
    "Each exported function has its place in its lesson, with a link to its line in the repository."
    from ddpm_tutorial._modidx import d
    repository = "https://github.com/ddpm-tutorial/ddpm-tutorial/blob/main"
    for module, symbols in d["syms"].items():
        for name, (place, _) in symbols.items():
            page, _, anchor = place.partition("#")
            if "." in name.removeprefix(module + ".") or anchor.startswith("_"): continue
            text = (site/page).read_text(encoding="utf-8")
            assert f'id="{anchor.lower()}"' in text.lower(), f"{name}: no {anchor} in {page}"
            assert f'href="{repository}/{module.replace(".", "/")}.py#L' in text, name


# the text of a page without code and formulas
WORDS = """() => {
    const main = document.querySelector('main').cloneNode(true);
    main.querySelectorAll('pre, code, .katex, svg').forEach(e => e.remove());
    return main.textContent;
}"""

@needed
def test_formulas(address, site):
    "The site's own KaTeX sets all of them. No page complains, or asks for anything from elsewhere."
    formulas = 0
    with chromium() as context:
        page = context.new_page()
        for name in pages(site):
            page.goto(f"{address}/{name}.html")
            set_formulas(page)
            formulas += page.locator(".katex").count()
            assert page.locator(".katex-error").count() == 0, name
            assert not re.findall(r"\$|\\[a-zA-Z]", page.evaluate(WORDS)), f"{name}: a raw formula"
    assert formulas > 500 and not context.complaints
    assert all(url.startswith((address, "data:")) for url in context.requests)


@needed
def test_search_finds_a_lesson(address):
    with chromium() as context:
        page = context.new_page()
        page.goto(f"{address}/index.html")
        page.keyboard.press("/")
        page.keyboard.type("cosine schedule")
        page.locator(".search-result", has_text="noise schedule").first.click()
        page.wait_for_url("**/scheduler.html*")
        assert "noise schedule" in page.locator("h1").inner_text() and not context.complaints


@needed
def test_dark_mode(address):
    "Background and letters change places, and the next page keeps the choice."
    brightness = ("e => getComputedStyle(e)[%r].match(/[0-9]+/g).slice(0, 3)"
                  ".reduce((sum, v) => sum + Number(v), 0)/3")
    def look(page):
        page.wait_for_timeout(300)
        places = (("body", "backgroundColor"), ("main p", "color"), (".sidebar-title a", "color"))
        return [page.locator(where).first.evaluate(brightness % what) for where, what in places]
    with chromium(color_scheme="light") as context:
        page = context.new_page()
        page.goto(f"{address}/embeddings.html")
        paper, letters, title = look(page)
        assert paper > 200 > 100 > max(letters, title)
        page.locator(".quarto-color-scheme-toggle").first.click()
        paper, letters, title = look(page)
        assert paper < 60 < 150 < min(letters, title)
        page.goto(f"{address}/attention.html")
        assert look(page)[0] < 60 and not context.complaints


# the first line of each block of code that has to be pushed aside to be read
HIDDEN = """() => [...document.querySelectorAll('pre.cell-code')]
    .filter(e => e.scrollWidth > e.clientWidth + 1)
    .map(e => e.textContent.split('\\n')[0])"""

@needed
def test_code_is_seen_whole(address, site):
    "On an ordinary laptop no line of code has to be pushed aside."
    with chromium(viewport={"width": 1440, "height": 900}) as context:
        page = context.new_page()
        for name in visit_all(page, address, site):
            hidden = page.evaluate(HIDDEN)
            assert not hidden, f"{name}: {hidden}"


# elements that reach beyond the screen, unless one around them scrolls
OVERHANG = """() => {
    const scrolls = e => {
        for (let p = e; p; p = p.parentElement)
            if (['auto', 'scroll'].includes(getComputedStyle(p).overflowX)) return true;
        return false;
    };
    return [...document.querySelectorAll('main *')]
        .filter(e => !e.closest('.katex-mathml, svg') && e.getBoundingClientRect().right > 392 && !scrolls(e))
        .map(e => e.outerHTML.slice(0, 120));
}"""

@needed
def test_on_a_phone(address, site):
    "Nothing is wider than the screen unless it scrolls by itself, and the menu opens."
    with chromium(viewport={"width": 390, "height": 800}) as context:
        page = context.new_page()
        for name in visit_all(page, address, site):
            set_formulas(page)
            assert page.evaluate("document.documentElement.scrollWidth") <= 390, name
            overhang = page.evaluate(OVERHANG)
            assert not overhang, f"{name}: {overhang[0]}"
        entry = page.locator("#quarto-sidebar a", has_text="05 The noise schedule").first
        playwright.expect(entry).not_to_be_in_viewport()
        page.locator(".quarto-btn-toggle").first.click()
        playwright.expect(entry).to_be_in_viewport()
        assert not context.complaints
