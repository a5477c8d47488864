"""What the HTML pages have in common: one file each, for light and dark screens of any width."""

import re
from html import escape
from string import Template
from typing import Final

PAGE: Final = Template("""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title><style>
:root { color-scheme: light dark }
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 75rem }
body { overflow-wrap: break-word; padding: 0 1rem }
$style</style></head><body>
$body
</body></html>
""")


def page(title: str, style: str, body: str) -> str:
    """Return a page; ``style`` and ``body`` are CSS and HTML."""
    return PAGE.substitute(title=escape(title), style=style, body=body)


def breakable(text: str) -> str:
    """Return a name as HTML that a line may break after ``_`` and ``/``, and not inside a word."""
    return re.sub(r"([_/])(?=\w)", r"\1<wbr>", escape(text))
