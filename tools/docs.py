"""Build the documentation site and README.md from the notebooks.

    python tools/docs.py site             # nbs/ -> _proc/ (nbdev) -> _md/ (Markdown) -> _docs/ (Sphinx)
    python tools/docs.py readme           # nbs/index.ipynb -> README.md
    python tools/docs.py readme --check   # exit 1 if README.md is stale

nbdev hides cells, adds an entry for each exported name and links the names in backticks. What it leaves
is meant for Quarto; this file turns it into Markdown that Sphinx and GitHub read.
"""

import argparse
import ast
import base64
import inspect
import itertools
import os.path
import re
import shutil
import subprocess
import sys
from collections import defaultdict
from pathlib import Path, PurePosixPath
from urllib.parse import urlsplit

import fastcore.docments
import yaml
from fastcore.nbio import read_nb
from nbdev.config import get_config, nbpath2html
from nbdev.serve import proc_nbs

from links import broken_links

config = get_config(Path(__file__).parent)
root, notebooks = config.config_path, config.nbs_path
site_url = config.doc_url.rstrip("/") + "/"

# The side bar: caption -> what the address of its pages starts with. A page that fits none fails the build.
contents = {"Tutorials": "tutorials/", "How-to": "howto/", "Explanations": "explanations/"}
contents |= {"Reference": "api/", "Benchmarks": "benchmarks/"}
top_order = ["learner", "cli", "testing"]  # then the layers, each with a page that lists its modules
layers = {
    "core": "What all other layers use: errors, nested data, seeds, durations",
    "store": "What is kept in files and read again: tables, histories, curves, runs",
    "data": "From files, arrays and datasets to batches",
    "metrics": "What is measured while a model trains, and afterwards",
    "loop": "The loop and its parts: steps, events, schedules, optimizers, state",
    "callbacks": "What happens beside training: records, progress, stopping, runs in a directory, trackers",
    "scale": "More than one device, and smaller numbers",
    "use": "Looking before training starts: a check of everything, summaries, reports",
    "apps": "Models and data that are ready to train",
}

image_types = {"image/png": "png", "image/jpeg": "jpg", "image/svg+xml": "svg", "image/gif": "gif"}
directive = re.compile(r"#\|\s*([\w-]+)\s*(?::\s*(.*?))?\s*$")
source_link = re.compile(r'\]\(([^)\s]+)\)\{target="_blank"[^}]*\}')
columns = re.compile(r"\S {2,}\S.* {2,}\S")  # a line of a table
no_signature = re.compile(r"```python\n+def \w+\(\s*\*args, \*\*kwargs\s*\):\n+```\n*")
sphinx_only = re.compile(r"^(\(api:.*\)=|\{\.\w+\})\n", re.M)
terminal_color = re.compile(r"\x1b\[[0-9;]*m")


def signature(thing, eval_str=False):
    """A signature; types that only a type checker imports stay text."""
    try:
        return inspect.signature(thing, eval_str=eval_str)
    except NameError:
        return inspect.signature(thing)


fastcore.docments.signature = signature  # nbdev writes its entries with it, and stops at such a type


def joined(text):
    return "".join(text) if isinstance(text, list) else text or ""


def split_directives(source):
    """The directives a cell starts with, and the rest of its text."""
    found, lines = {}, joined(source).splitlines()
    while lines and (match := directive.match(lines[0])):
        found[match[1]] = match[2] or "true"
        lines.pop(0)
    return found, "\n".join(lines).strip("\n")


def fence(text, language=""):
    """Text as a code block; its fence is longer than any fence within the text."""
    marks = "`" * max(3, 1 + max((len(run) for run in re.findall(r"`+", text)), default=0))
    return f"{marks}{language}\n{text}\n{marks}"


def plain(text):
    """Text that a cell wrote. Long lines are broken on the site, but not those of a table."""
    text = terminal_color.sub("", joined(text)).rstrip("\n")
    return fence(text, "text" if columns.search(text) else "output") if text.strip() else ""


def only_imports(source):
    imports = re.compile("import |from |if TYPE_CHECKING:")
    return all(imports.match(ast.unparse(statement)) for statement in ast.parse(source).body)


def is_entry(cell):
    return cell.cell_type == "code" and "show_doc(" in cell.source


def entries_in_order(cells):
    """Neighbouring API entries as their code is ordered; nbdev turns the names of a cell around."""

    def line(cell):
        found = re.search(r"\.py#L(\d+)\)", "".join(str(output) for output in cell.outputs))
        return int(found[1]) if found else 0

    for entries, group in itertools.groupby(cells, is_entry):
        yield from sorted(group, key=line) if entries else group


class Page:
    """One notebook, as nbdev processed it, to be written as Markdown for the site or for GitHub."""

    def __init__(self, processed, name, for_github, images):
        first, *self.cells = processed.cells
        self.facts = yaml.safe_load(joined(first.source).strip().strip("-"))  # title and description
        self.name, self.for_github = PurePosixPath(name), for_github
        self.url = nbpath2html(self.name).as_posix()
        self.images, self.n_images, self.entries = images, 0, set()

    def link(self, url):
        """Where a link leads to: relative within the site, absolute from GitHub."""
        parts = urlsplit(url)
        if url.startswith(site_url):
            path = url[len(site_url) :].split("#")[0]
            parts = parts._replace(fragment=parts.fragment.split(".")[0])  # a method's entry is its class's
        elif parts.path.endswith(".ipynb") and not parts.netloc:
            path = os.path.normpath(self.name.parent / nbpath2html(parts.path))
        else:
            return url
        fragment = f"#{parts.fragment}" if parts.fragment else ""
        if self.for_github:
            return site_url + path + fragment
        if path == self.url and fragment:
            return fragment
        return os.path.relpath(path, os.path.dirname(self.url) or ".") + fragment

    def markdown(self, text):
        text = source_link.sub(r"](\1)" + ("" if self.for_github else "{.source-link}"), text)
        lines, in_code = [], False
        for line in text.splitlines():
            in_code ^= line.lstrip().startswith("```")
            if not in_code:
                line = re.sub(r"\]\(([^)\s]+)\)", lambda match: f"]({self.link(match[1])})", line)
            lines.append(line)
        return "\n".join(lines)

    def api_entry(self, text):
        """The entry of an exported name. Its target becomes the id that nbdev's links use (sphinx/conf.py)."""
        text = no_signature.sub("", re.sub(r"\A\s*---\s*\n", "", text))
        heading = re.search(r"^#+ (\S+)\s*$", text, re.M)
        if heading and (name := heading[1].lower()) not in self.entries:
            self.entries.add(name)
            text = f"{text[: heading.start()]}(api:{self.url}:{name})=\n{text[heading.start() :]}"
        return self.markdown(text)

    def image(self, data, extension, is_figure):
        self.n_images += 1
        file = self.images / f"{PurePosixPath(self.url).stem}-{self.n_images}.{extension}"
        file.parent.mkdir(parents=True, exist_ok=True)
        content = data.encode() if extension == "svg" else base64.b64decode(data)
        file.write_bytes(content)
        # A PNG says its width in bytes 16 to 20; notebooks draw figures at twice the size, for sharp screens.
        sharp = is_figure and extension == "png" and not self.for_github
        size = f"{{width={int.from_bytes(content[16:20], 'big') // 2}px}}" if sharp else ""
        return f"![]({self.images.name}/{file.name}){size}"

    def output(self, output, as_is):
        if output["output_type"] == "stream":
            return joined(output["text"]) if as_is else plain(output["text"])
        if output["output_type"] == "error":
            return plain("\n".join(output["traceback"]))
        data = output["data"]
        if "text/markdown" in data:
            return (self.api_entry if as_is else self.markdown)(joined(data["text/markdown"]))
        for kind, extension in image_types.items():
            if kind in data:
                is_figure = joined(data.get("text/plain")).startswith("<Figure")
                return self.image(joined(data[kind]), extension, is_figure)
        if "text/html" in data and not self.for_github:  # a blank line would end the HTML block
            html = re.sub(r"\n\s*\n", "\n", joined(data["text/html"]))
            return f'<div class="nb-html">\n{html}\n</div>'
        return plain(data.get("text/plain"))

    def cell(self, cell):
        """The parts of one cell: its text or code, and its outputs."""
        directives, source = split_directives(cell.source)
        if directives.get("include") == "false" or source.startswith("<!-- WARNING"):
            return []
        if cell.cell_type == "markdown":
            return [self.markdown(source)]
        if cell.cell_type != "code":
            return []
        code = [fence(source, "python")] if source and directives.get("echo") != "false" else []
        if directives.get("output") == "false":
            return code
        return code + [self.output(output, directives.get("output") == "asis") for output in cell.outputs]

    def exported(self):
        """The exported code before each cell that nbdev kept, by id: the page shows what it explains."""
        code, kept, waiting = {}, {cell.id for cell in self.cells}, []
        for cell in read_nb(notebooks / self.name).cells:
            directives, source = split_directives(cell.source)
            if cell.cell_type == "code" and "export" in directives and not only_imports(source):
                waiting.append(source)
            if cell.id in kept:
                code[cell.id], waiting = waiting, []
        return code | {"end": waiting}

    def folded(self, sources, after_entry):
        """Code blocks; folded where the entry of the name, with its signature, stands before."""
        state = "" if after_entry else " open"
        for source in sources:
            yield f"<details{state}><summary>Code</summary>\n\n{fence(source, 'python')}\n\n</details>"

    def header(self):
        yield f"# {self.facts['title']}"
        if text := self.facts.get("description"):
            yield f"> {text}" if self.for_github else f"{{.subtitle}}\n{text}"
        if not self.for_github:
            place = f"blob/{config.branch}/{notebooks.name}/{self.name}"
            colab = urlsplit(config.git_url)._replace(netloc="colab.research.google.com")
            colab = f"{colab._replace(path='/github' + colab.path).geturl()}/{place}"
            links = f"[Notebook on GitHub]({config.git_url}/{place}) · [Open in Colab]({colab})"
            yield f"{{.notebook}}\n{links}, after `%pip install git+{config.git_url}`"

    def render(self):
        parts, after_entry = [*self.header()], False
        code = {} if self.for_github else self.exported()
        for cell in entries_in_order(self.cells):
            parts += self.folded(code.pop(cell.id, ()), after_entry)
            parts += self.cell(cell)
            after_entry = is_entry(cell)
        parts += self.folded(code.get("end", ()), after_entry)
        return re.sub(r"\n{3,}", "\n\n", "\n\n".join(part for part in parts if part.strip())).strip() + "\n"


def write_readme(check):
    processed = proc_nbs(n_workers=1, force=True, file_glob=config.readme_nb)
    page = Page(read_nb(processed / config.readme_nb), config.readme_nb, True, root / "README_files")
    note = "<!-- Made from nbs/index.ipynb by `python tools/docs.py readme`: edit the notebook. -->\n\n"
    text, readme = note + page.render(), root / "README.md"
    if not check:
        readme.write_text(text, encoding="utf-8")
    elif not readme.exists() or readme.read_text(encoding="utf-8") != text:
        sys.exit("README.md is stale: run `python tools/docs.py readme`")


def toctree(caption, pages):
    options = [":hidden:"] + ([f":caption: {caption}"] if caption else [])
    return "\n".join(["```{toctree}", *options, "", *pages, "```", ""])


def layer_page(layer, modules):
    """A page that lists the modules of a layer; `modules` maps an address to what the page begins with."""
    names = [PurePosixPath(url).name for url in modules]
    lines = [f"- [{name}]({name}.html): {text}" for name, text in zip(names, modules.values())]
    return "\n".join([f"# {layer}", "", "{.subtitle}", layers[layer], "", *lines, "", toctree("", names)])


def table_of_contents(pages):
    """The side bar as Sphinx reads it. Pages come in the order of their file names."""
    left = [nbpath2html(page).with_suffix("").as_posix() for page in pages if page.name != config.readme_nb]
    for caption, start in contents.items():
        here = [page for page in left if page.startswith(start)]
        left = [page for page in left if page not in here]
        if caption == "Reference":
            top = [page for page in here if page.count("/") == 1]
            top.sort(key=lambda page: top_order.index(page.removeprefix(start)))
            present = {page.split("/")[1] for page in here if page not in top}
            here = top + [f"api/{layer}/index" for layer in sorted(present, key=[*layers].index)]
        if here:
            yield toctree(caption, here)
    if left:
        sys.exit(f"These pages are in no part of the side bar (`contents` in tools/docs.py): {left}")


def build_site():
    processed, markdown, site = proc_nbs(n_workers=2, force=True), root / "_md", root / "_docs"
    for folder in [markdown, site]:
        shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(root / "tools" / "sphinx", markdown)
    for file in processed.rglob("*"):
        if file.suffix[1:] in image_types.values():
            (markdown / file.relative_to(processed)).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(file, markdown / file.relative_to(processed))
    pages = sorted(file.relative_to(processed) for file in processed.rglob("*.ipynb"))
    modules = defaultdict(dict)
    for page in pages:
        file = markdown / nbpath2html(page).with_suffix(".md")
        file.parent.mkdir(parents=True, exist_ok=True)
        page_on_site = Page(read_nb(processed / page), page, False, file.parent / "images")
        text = page_on_site.render()
        if (layer := PurePosixPath(page_on_site.url).parent).parent.name == "api":
            modules[layer.name][page_on_site.url.removesuffix(".html")] = page_on_site.facts["description"]
        side_bar = "\n".join(["", *table_of_contents(pages)]) if page.name == config.readme_nb else ""
        file.write_text(text + side_bar, encoding="utf-8")
    for layer in modules:
        (markdown / "api" / layer / "index.md").write_text(layer_page(layer, modules[layer]), encoding="utf-8")
    sphinx = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-b", "html", markdown, site]
    subprocess.run(sphinx, check=True)
    for page in pages:  # the plain text of a page, which the `Docs:` line of its module points to
        url = nbpath2html(page)
        text = (markdown / url.with_suffix(".md")).read_text(encoding="utf-8")
        (site / f"{url}.md").write_text(sphinx_only.sub("", text), encoding="utf-8")
    if (notebooks / "llms.txt").exists():
        shutil.copy2(notebooks / "llms.txt", site)
    (site / ".nojekyll").touch()  # or GitHub Pages leaves out _static/
    if broken := list(broken_links(site.resolve())):
        sys.exit("Broken links:\n" + "\n".join(broken))
    print(f"{len(pages)} pages in {site}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Build the documentation site or README.md.")
    parser.add_argument("what", choices=["site", "readme"])
    parser.add_argument("--check", action="store_true", help="readme: only say whether README.md is stale")
    arguments = parser.parse_args()
    build_site() if arguments.what == "site" else write_readme(arguments.check)
