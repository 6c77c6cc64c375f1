"""How Sphinx renders what tools/docs.py writes. Name, author, version and addresses: the package's own."""

from importlib.metadata import metadata

package = metadata("nbdev_trainer")
urls = dict(entry.split(", ", 1) for entry in package.get_all("Project-URL"))
project, author, release = package["Name"], package["Author"], package["Version"]

extensions = ["myst_parser", "sphinx_copybutton"]
myst_enable_extensions = ["alert", "attrs_inline", "dollarmath", "linkify", "tasklist"]
myst_heading_anchors = 4
myst_all_links_external = True  # tools/docs.py wrote and checks the links; MyST would rewrite some
suppress_warnings = ["myst.header"]  # the parts of nbdev's API entries start at any heading level

html_title = f"{project} {release}"
html_theme = "furo"
html_static_path = ["_static"]
html_css_files = ["custom.css"]
html_baseurl = urls["Documentation"]
html_copy_source = html_show_sourcelink = html_show_copyright = False
github = {"name": "GitHub", "url": urls["Repository"], "html": "GitHub", "class": ""}
html_theme_options = {"top_of_page_buttons": [], "footer_icons": [github]}
