"""What a page holds, for those who ask."""

from __future__ import annotations

import base64
from html.parser import HTMLParser


class Reader(HTMLParser):
    """Collects what the tests ask about a page."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.rows: list[list[str]] = []
        self.columns: list[str] = []
        self.text = ""
        self._in_runs = False
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        named = dict(attrs)
        self.tags.append((tag, named))
        if tag == "table":
            self._in_runs = named.get("id") == "runs"
        if self._in_runs and tag == "tr":
            self.rows.append([])
        if self._in_runs and "data-column" in named:
            self.columns.append(named["data-column"] or "")
        if self._in_runs and "data-value" in named:
            self.rows[-1].append(named["data-value"] or "")

    def handle_data(self, data: str) -> None:
        self.text += data

    def addresses(self) -> list[str]:
        names = ("src", "srcset", "href", "data", "action")
        return [attrs[name] or "" for _, attrs in self.tags for name in names if name in attrs]

    def drawings(self) -> list[str]:
        prefix = "data:image/svg+xml;base64,"
        return [
            base64.b64decode(address.removeprefix(prefix)).decode()
            for address in self.addresses()
            if address.startswith(prefix)
        ]
