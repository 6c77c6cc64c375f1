"""Find dead links within a folder of HTML pages."""

from html.parser import HTMLParser
from urllib.parse import unquote, urlsplit


class References(HTMLParser):
    """The ids of an HTML page, and what it links to."""

    def __init__(self, html):
        super().__init__()
        self.ids, self.links = set(), []
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        self.ids.add(values.get("id"))
        self.links.append(values.get({"a": "href", "img": "src"}.get(tag)) or "#")


def broken_links(folder):
    """Links within the site that lead to no file, or to no id of a page. Sphinx does not look at these."""
    pages = {file: References(file.read_text(encoding="utf-8")) for file in folder.rglob("*.html")}
    for file, references in pages.items():
        for link in references.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc or link == "#":
                continue
            target = (file.parent / unquote(parts.path)).resolve() if parts.path else file
            target = target / "index.html" if target.is_dir() else target
            no_id = parts.fragment and target in pages and unquote(parts.fragment) not in pages[target].ids
            if no_id or not target.exists():
                yield f"{file.relative_to(folder)}: {link}"
