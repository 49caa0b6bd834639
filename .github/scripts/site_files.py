"""A hook of mkdocs: what lies outside of docs/ is on the site too, and links work there as they do in the repository.

Pages are written for whoever reads them in the repository: a link is a path from the file that it stands in. Here each
such path becomes that of the file's place on the site. A link to a file that has no place there keeps its words alone.
One that leads nowhere is left as it is: mkdocs then says so, and with `--strict` there is no site.

Nor is there one if a page would fetch anything from elsewhere.
"""

import re
from pathlib import Path
from posixpath import normpath, relpath
from typing import Any
from urllib.parse import unquote, urlsplit
from xml.etree.ElementTree import Element

from markdown import Markdown
from markdown.extensions import Extension
from markdown.treeprocessors import Treeprocessor
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.plugins import get_plugin_logger
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[2]
READMES = sorted(ROOT.glob("packages/*/README.md"))
FILES = ("bench/plots/*.svg", "bench/results/*.csv", "bench/suites/*.toml")
ELSEWHERE = {  # what lies outside of docs/, and its place on the site
    "README.md": "index.md",
    "SECURITY.md": "security.md",
    "bench/README.md": "bench.md",
    **{f"packages/{file.parent.name}/README.md": f"packages/{file.parent.name}.md" for file in READMES},
    **{(path := file.relative_to(ROOT).as_posix()): path for kind in FILES for file in sorted(ROOT.glob(kind))},
}
FETCHED = re.compile(r'<(?:script|link|img|iframe)\b[^>]*\b(?:src|href)="((?:https?:)?//[^"]*)"')
PLACES = {place: source for source, place in ELSEWHERE.items()}


class LinksOfTheRepository(Treeprocessor):
    """Turns paths from the file in the repository into paths from the page on the site."""

    page = ""  # place on the site of the page that is being converted

    def run(self, root: Element) -> None:
        for element in root.iter():
            for attribute in ("href", "src"):
                if target := element.get(attribute):
                    self._turn(element, attribute, target)

    def _turn(self, element: Element, attribute: str, target: str) -> None:
        parts = urlsplit(target)
        if parts.scheme or parts.netloc or not parts.path:
            return
        source = PLACES.get(self.page, f"docs/{self.page}")
        path = normpath(Path(source).parent.joinpath(unquote(parts.path)).as_posix())
        place = ELSEWHERE.get(path, path.removeprefix("docs/") if path.startswith("docs/") else None)
        if place is not None:
            here = relpath(place, Path(self.page).parent.as_posix())
            element.set(attribute, parts._replace(path=here).geturl())
        elif element.tag == "a" and (ROOT / path).exists():
            element.tag = "span"
            del element.attrib[attribute]


LINKS = LinksOfTheRepository()


class Links(Extension):
    """Gives LINKS to the Markdown of pages and of docstrings."""

    def extendMarkdown(self, md: Markdown) -> None:
        md.treeprocessors.register(LINKS, "links of the repository", 1)  # 0 is where mkdocs looks at links


def on_config(config: MkDocsConfig) -> None:
    """Have links turned."""
    config.markdown_extensions.append(Links())  # type: ignore[arg-type]


def on_files(files: Files, config: MkDocsConfig) -> None:
    """Take in what lies elsewhere."""
    for source, place in ELSEWHERE.items():
        files.append(File.generated(config, place, abs_src_path=str(ROOT / source)))


def on_page_markdown(markdown: str, page: Page, **_: Any) -> None:
    """Say which page comes."""
    LINKS.page = page.file.src_uri


def on_post_page(output: str, page: Page, config: MkDocsConfig) -> None:
    """Look for what a browser would fetch."""
    for address in set(FETCHED.findall(output)) - {page.canonical_url}:
        get_plugin_logger("site").warning(f"{page.file.src_uri} fetches {address}")
