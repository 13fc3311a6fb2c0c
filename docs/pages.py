"""What `make docs` adds to the pages in this folder: the root's texts, the API reference, and checks."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

_ROOT = Path(__file__).parents[1]
_ROOT_TEXTS = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
    "CHANGELOG.md": "changelog.md",
}
_SOURCES = {page: name for name, page in _ROOT_TEXTS.items()}
_PACKAGES = ("pipeline", "service")
_LINK = re.compile(r"\[(?P<text>[^\]]+)\]\((?P<target>[^)#:\s]+)(?P<anchor>#[^)\s]*)?\)")  # a colon: another site
_TEST = re.compile(r"`(test_\w+)`")
_FOREIGN = re.compile(r'<(?:script|link|img|iframe)\b[^>]*\b(?:src|href)="(?:https?:)?//[^"]*"')


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that have no file in docs/, and list them in the navigation."""
    for name, page in _ROOT_TEXTS.items():
        files.append(File.generated(config, page, abs_src_path=str(_ROOT / name)))
    for name in _modules():
        text = f"# `{name}`\n\n::: {name}\n    options: {{show_root_heading: false, show_root_toc_entry: false}}\n"
        files.append(File.generated(config, f"reference/{name}.md", content=text))
    config.nav = [_expanded(entry, files) for entry in config.nav or []]
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Point links to files of the repository at their pages, and drop those to files that have none."""
    made = page.file.src_uri
    if made == "promises.md":
        _require_tests(markdown)
    source = _SOURCES.get(made, f"docs/{made}")

    def link(found: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(source), found["target"]))
        if destination := _page_of(target):
            near = posixpath.relpath(destination, posixpath.dirname(made) or ".")
            return f"[{found['text']}]({near}{found['anchor'] or ''})"
        # Code or settings: the name is enough. An absent file is left as it is, for --strict to find.
        return found["text"] if (_ROOT / target).exists() else found[0]

    return _LINK.sub(link, markdown)


def on_post_page(output: str, page: Page, **_: Any) -> str:
    """Refuse a page that loads anything from another host: it works offline, and nobody learns who reads it."""
    if foreign := _FOREIGN.search(output):
        raise PluginError(f"{page.file.src_uri} loads {foreign[0]} from another host. Put the file into docs/")
    return output


def _require_tests(markdown: str) -> None:
    """Refuse promises whose tests do not exist."""
    sources = "\n".join(path.read_text(encoding="utf-8") for path in (_ROOT / "tests").glob("*.py"))
    if absent := set(_TEST.findall(markdown)) - set(re.findall(r"def (test_\w+)", sources)):
        raise PluginError(f"promises.md: no such tests: {', '.join(sorted(absent))}. Correct the names")


def _page_of(path: str) -> str | None:
    """Name the page made of a file of the repository, None if there is none."""
    return _ROOT_TEXTS.get(path) or (path.removeprefix("docs/") if path.startswith("docs/") else None)


def _modules() -> Iterator[str]:
    """Name the public packages and modules one level below `pipeline` and `service`: one reference page each."""
    for package in _PACKAGES:
        for path in sorted((_ROOT / package).iterdir()):
            is_module = path.suffix == ".py" or (path / "__init__.py").exists()
            if is_module and not path.name.startswith("_"):
                yield f"{package}.{path.stem}"


def _expanded(entry: Any, files: Files) -> Any:
    """Replace "folder/*" in an entry of the navigation by the folder's pages, its index first."""
    if isinstance(entry, dict):
        return {title: _expanded(value, files) for title, value in entry.items()}
    if isinstance(entry, list):
        return [_expanded(item, files) for item in entry]
    if not entry.endswith("/*"):
        return entry
    pages = [file.src_uri for file in files.documentation_pages() if file.src_uri.startswith(entry[:-1])]
    return sorted(pages, key=lambda page: (not page.endswith("/index.md"), page))
