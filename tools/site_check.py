"""Read the built site in a headless Chromium, as a reader would: search, tutorials, dark mode, a phone.

    python tools/docs.py site && python tools/site_check.py

Prints what is wrong and exits with 1. Says "skipped" where there is no Chromium.
"""

import functools
import os
import shutil
import sys
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from nbdev.config import get_config, nbpath2html
from playwright.sync_api import Error, sync_playwright

config = get_config(Path(__file__).parent)
site, notebooks = config.config_path / "_docs", config.nbs_path
phone, n_first = {"width": 390, "height": 844}, 3

searched = {  # a name, and the page that has to be among the first `n_first` that the search finds
    "Learner": "api/learner",
    "Trainer": "api/loop/trainer",
    "Loaders": "api/data/loaders",
    "Accuracy": "api/metrics/classification",
    "Callback": "api/loop/callback",
    "EarlyStopping": "api/callbacks/stopping",
    "check": "api/use/check",
    "History": "api/store/history",
    "SupervisedStep": "api/loop/steps",
    "one_cycle": "api/loop/schedules",
}
# What reaches beyond the screen, but for what scrolls within a box. The page as a whole may hide it.
too_wide = """[...document.querySelectorAll("article, .content *")].filter(one => {
    if (one.getBoundingClientRect().right <= innerWidth + 1) return false;
    for (let box = one.parentElement; !box.matches(".content"); box = box.parentElement)
        if (["auto", "scroll"].includes(getComputedStyle(box).overflowX)) return false;
    return true;
}).slice(0, 3).map(one => `${one.tagName} ${one.textContent.trim().slice(0, 40)}`)"""
brightness = """getComputedStyle(document.body).backgroundColor.match(/\\d+/g).slice(0, 3)
    .reduce((sum, part) => sum + Number(part) / 3, 0)"""


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


def source_pages():
    """The notebook of each page of the site that is made from one."""
    found = (file.relative_to(notebooks) for file in sorted(notebooks.rglob("*.ipynb")))
    return {nbpath2html(page).as_posix(): page for page in found if not any(p[0] in "._" for p in page.parts)}


def width_and_links(tab, base):
    """Every page on a phone: nothing wider than the screen, and the links to its notebook."""
    pages = source_pages()
    for file in sorted(site.rglob("*.html")):
        url = file.relative_to(site).as_posix()
        tab.goto(base + url)
        width, wide = tab.evaluate("document.scrollingElement.scrollWidth"), tab.evaluate(too_wide)
        if width > phone["width"] or wide:
            yield f"{url} is {width} px wide on a phone; beyond the screen: {wide}"
        links = tab.evaluate("[...document.querySelectorAll('article a')].map(link => link.href)")
        for host in ["github.com", "colab.research.google.com"]:
            if url in pages and not any(host in link and link.endswith(f"/{pages[url]}") for link in links):
                yield f"{url} has no link to {pages[url]} at {host}"
    yield from (f"{page} has no page {url}" for url, page in pages.items() if not (site / url).exists())


def search(tab, base):
    for name, page in searched.items():
        tab.goto(base)
        tab.fill(".sidebar-search", name)
        tab.press(".sidebar-search", "Enter")
        tab.wait_for_selector("#search-results .search-summary:not(:empty)")
        tab.wait_for_load_state("networkidle")  # the summaries below the hits are fetched
        hits = tab.evaluate("[...document.querySelectorAll('ul.search > li > a')].map(link => link.pathname)")
        if f"/{page}.html" not in hits[:n_first]:
            yield f"a search for {name} does not find {page} among the first {n_first}: {hits[:n_first]}"


def tutorials(tab, base):
    """From the front page: each tutorial in the side bar, and from the first on by the links at the foot."""
    tab.goto(base)
    listed = tab.evaluate("[...document.querySelectorAll('.sidebar-tree a')].map(link => link.pathname)")
    listed = [url for url in listed if url.startswith("/tutorials/")]
    missing = [url for url in source_pages() if url.startswith("tutorials/") and f"/{url}" not in listed]
    yield from (f"{url} is not in the side bar of the front page" for url in missing)
    for url in listed:
        tab.click("a.next-page")
        if not tab.url.endswith(url):
            yield f"the link at the foot of the page before {url} leads to {tab.url}"
            tab.goto(base + url[1:])


def dark(tab, base):
    """The button turns light into dark; text is readable in both, and the choice holds on the next page."""
    tab.goto(base)
    for wanted in ["light", "dark"]:
        for _ in range(3):
            if tab.evaluate("document.body.dataset.theme") != wanted:
                tab.click(".content-icon-container .theme-toggle")
        if (tab.evaluate(brightness) < 128) != (wanted == "dark"):
            yield f"{wanted} has a background of brightness {tab.evaluate(brightness):.0f}"
    tab.goto(base + "api/learner.html")
    if tab.evaluate(brightness) > 128:
        yield "the next page is not dark any more"


def problems(browser, base):
    found = []
    desk = {"width": 1400, "height": 900}
    for check, size in [(width_and_links, phone), (search, desk), (tutorials, desk), (dark, desk)]:
        tab = browser.new_page(viewport=size)
        tab.on("pageerror", lambda error: found.append(f"{tab.url}: {error}"))
        tab.on("console", lambda line: line.type == "error" and found.append(f"{tab.url}: {line.text}"))
        tab.on("request", lambda asked: asked.url.startswith((base, "data:")) or found.append(
            f"{tab.url} asks for {asked.url}: the site has to do without other servers"))
        tab.set_default_timeout(10_000)
        try:
            found += check(tab, base)
        except Error as error:  # such as a link that is not there
            found.append(f"{tab.url} in {check.__name__}: {error.message}")
        tab.close()
    return found


def main():
    names = ["chromium", "chromium-browser", "google-chrome"]
    chromium = next(filter(None, map(shutil.which, names)), None)
    if chromium is None:
        return print(f"skipped: none of {', '.join(names)} is installed")
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=site))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    as_root = ["--no-sandbox"] if os.geteuid() == 0 else []  # Chromium's sandbox refuses root
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=as_root)
        found = problems(browser, f"http://127.0.0.1:{server.server_port}/")
        browser.close()
    server.shutdown()
    n_pages = len(list(site.rglob("*.html")))
    print(*found, f"{n_pages} pages read in Chromium, {len(found)} problems", sep="\n")
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
