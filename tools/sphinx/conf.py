"""How Sphinx renders what tools/docs.py writes. Name, author, version and addresses: the package's own."""

from importlib.metadata import metadata

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml

package = metadata("nbdev_trainer")
urls = dict(entry.split(", ", 1) for entry in package.get_all("Project-URL"))
project, author, release = package["Name"], package["Author"], package["Version"]

extensions = ["myst_parser", "sphinx_copybutton"]
myst_enable_extensions = ["alert", "attrs_block", "attrs_inline", "dollarmath", "linkify", "tasklist"]
myst_heading_anchors = 4
myst_all_links_external = True  # tools/docs.py wrote and checks the links; MyST would rewrite some
suppress_warnings = ["myst.header"]  # the parts of nbdev's API entries start at any heading level

html_title = f"{project} {release}"
html_theme = "furo"
html_static_path = ["_static"]
html_css_files = ["custom.css"]
html_baseurl = urls["Documentation"]
html_favicon = "_static/favicon.svg"
html_math_renderer = "mathml"
html_copy_source = html_show_sourcelink = html_show_copyright = False
github = {"name": "GitHub", "url": urls["Repository"], "html": "GitHub", "class": ""}
html_theme_options = {"top_of_page_buttons": [], "footer_icons": [github]}


def give_entries_their_ids(app, doctree):
    """The section of an API entry gets the id that nbdev links to, `one_cycle`; any other section loses it."""
    sections, targets = list(doctree.findall(nodes.section)), {}
    for section in sections:
        if target := next((name for name in section["names"] if name.startswith("api:")), None):
            targets[target.split(":")[-1]] = section
    for section in sections:
        section["ids"] = [f"about-{name}" if name in targets else name for name in section["ids"]]
    for name, section in targets.items():
        section["ids"] = [name]


def visit_math(translator, node):
    """Formulas as MathML, which browsers show by themselves: no script, no other server."""
    block = isinstance(node, nodes.math_block)
    formula = tex2mathml(node.astext(), as_block=block)
    translator.body.append(f'<div class="math">{formula}</div>' if block else formula)
    raise nodes.SkipNode


def setup(app):
    app.connect("doctree-read", give_entries_their_ids, priority=100)  # before the contents are collected
    app.add_html_math_renderer("mathml", (visit_math, None), (visit_math, None))
