"""One self-contained HTML page: what reports of runs, model versions and searches are made of.

A page is to be read years later, from a bucket, out of a mail, behind a firewall. So everything is
inside the one file, and the page itself forbids the browser to load or to run anything else.

What is not Markup is text and is escaped where it enters the page: nobody has to remember it.
Figures are drawn in figures.py.
"""

import base64
import html
import re
from collections.abc import Collection, Iterable, Mapping, Sequence

from pipeline.models.palette import DARK, LIGHT, variables


class Markup(str):
    """HTML as it stands; whatever is in it from outside has been escaped."""

    __slots__ = ()


def escaped(content: object) -> Markup:
    """Content for the page: Markup as it is, anything else as text."""
    return content if isinstance(content, Markup) else Markup(html.escape(str(content)))


def element(tag: str, *content: object, **attributes: object) -> Markup:
    """One element; a trailing `_` of an attribute's name is left out, as of `class_`."""
    written = "".join(
        f' {name.rstrip("_").replace("_", "-")}="{html.escape(str(value))}"'
        for name, value in attributes.items()
    )
    return Markup(f"<{tag}{written}>{''.join(map(escaped, content))}</{tag}>")


def paragraph(*content: object) -> Markup:
    return element("p", *content)


def note(*content: object) -> Markup:
    """A paragraph in small print; also what is said where there is nothing to show."""
    return element("p", *content, class_="note")


def command(text: str) -> Markup:
    """Something to be copied into a terminal."""
    return element("pre", element("code", text))


def section(title: str, *content: object) -> Markup:
    return element("section", element("h2", title), *content)


def folded(title: str, *content: object) -> Markup:
    """What few will want to see, behind its title."""
    return element("details", element("summary", title), *content)


def facts(values: Mapping[str, object]) -> Markup:
    """Names and what they are."""
    rows = (
        element("tr", element("th", name, scope="row"), element("td", value))
        for name, value in values.items()
    )
    return element("div", element("table", *rows, class_="facts"), class_="wide")


def table(
    header: Sequence[object],
    rows: Iterable[Sequence[object]],
    numbers: Collection[int] = (),
    words: Collection[int] = (),
) -> Markup:
    """`numbers` are the columns that are set flush right, `words` those of sentences."""
    classes = {**dict.fromkeys(numbers, "number"), **dict.fromkeys(words, "words")}

    def cells(tag: str, row: Iterable[object], **more: object) -> Iterable[Markup]:
        for column, content in enumerate(row):
            of = {"class_": classes[column]} if column in classes else {}
            yield element(tag, content, **more, **of)

    head = element("thead", element("tr", *cells("th", map(_breakable, header), scope="col")))
    body = element("tbody", *(element("tr", *cells("td", row)) for row in rows))
    return element("div", element("table", head, body), class_="wide")


def _breakable(name: object) -> Markup:
    """A heading that may be broken behind the points and underscores of a setting's name."""
    return Markup(re.sub(r"(?<=[._])(?=\w)", "<wbr>", escaped(name)))


_WIDTH_OF_SMALL = 320
"""Pixels on the page, which small pictures are brought near to."""


def picture(data: bytes, alt: str, caption: object) -> Markup:
    """A PNG or JPEG inside of the page; a small PNG is shown larger, pixel by pixel."""
    png = data.startswith(b"\x89PNG")
    source = f"data:image/{'png' if png else 'jpeg'};base64,{base64.b64encode(data).decode()}"
    width = int.from_bytes(data[16:20]) if png else 0  # of the header that every PNG begins with
    times = _WIDTH_OF_SMALL // width if width else 0
    larger = f' width="{times * width}" class="pixels"' if times > 1 else ""
    image = Markup(f'<img src="{source}" alt="{html.escape(alt)}"{larger}>')
    return element("figure", image, element("figcaption", caption))


def beside(*content: object) -> Markup:
    """Figures next to each other where the screen is wide enough."""
    return element("div", *content, class_="beside")


def page(title: str, *content: object) -> bytes:
    """The file. What UTF-8 cannot hold, as half of a pair of surrogates, shows as a mark of its own."""
    head = (
        '<meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
        "style-src 'unsafe-inline'\">"
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style>"
    )
    body = "".join(map(escaped, (element("h1", title), *content)))
    text = f'<!DOCTYPE html>\n<html lang="en"><head>{head}</head><body><main>{body}</main></body></html>\n'
    return text.encode("utf-8", "xmlcharrefreplace")


_STYLE = (
    variables(LIGHT)
    + "@media (prefers-color-scheme: dark){"
    + variables(DARK)
    + "}"
    + """
:root{color-scheme:light dark}
body{margin:0;background:var(--page);color:var(--ink);
  font:16px/1.5 system-ui,"Segoe UI",Roboto,Arial,sans-serif}
main{max-width:66rem;margin:0 auto;padding:1.5rem 1.25rem 4rem}
h1{font-size:1.7rem;line-height:1.2;margin:.5rem 0 1rem}
h2{font-size:1.2rem;margin:2.5rem 0 .6rem;padding-bottom:.25rem;border-bottom:1px solid var(--line)}
h3{font-size:1rem;margin:1.5rem 0 .4rem}
p{max-width:46rem;margin:.6rem 0}
.note,figcaption{color:var(--faint);font-size:.875rem}
.wide{overflow-x:auto;margin:.8rem 0}
table{border-collapse:collapse;font-size:.875rem;font-variant-numeric:tabular-nums}
th,td{padding:.25rem .65rem .25rem 0;text-align:left;vertical-align:top;border-bottom:1px solid var(--line)}
thead th{color:var(--faint);font-weight:600;vertical-align:bottom;overflow-wrap:break-word}
.facts th{color:var(--faint);font-weight:400;white-space:nowrap}
td{overflow-wrap:break-word;max-width:30rem}
.number{text-align:right}
td.number{white-space:nowrap}
td.words{min-width:13rem;overflow-wrap:anywhere;white-space:pre-line}
pre{background:var(--panel);padding:.6rem .8rem;border-radius:4px;
  font-size:.875rem;white-space:pre-wrap;overflow-wrap:anywhere}
figure{margin:1rem 0}
.beside{display:flex;flex-wrap:wrap;gap:0 2rem}
figure svg,figure img{display:block;max-width:100%;height:auto}
figure img{border-radius:4px}
.chart{margin:.6rem 0}
.pixels{image-rendering:pixelated}
figure svg text{font-family:system-ui,"Segoe UI",Roboto,Arial,sans-serif!important}
figcaption{max-width:46rem;margin-top:.3rem}
summary{cursor:pointer;color:var(--faint)}
@media print{main{max-width:none;padding:0}section{break-inside:avoid-page}}
"""
)
