"""Draws docs/papers.md as one page, site/index.html: prose and formulas on the left, their code on the right.

    python docs/page.py          (make site; wants the extra "docs": pip install '.[docs]')
"""

import argparse
import html
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SOURCE, SITE = ROOT / "docs" / "papers.md", ROOT / "site" / "index.html"

STYLE = """
:root { color-scheme: light dark; --ink: #1c1e21; --paper: #fdfdfb; --soft: #f1f0ea; --line: #d8d6cc; --faint: #5c6066;
        --link: #0b57a4; --tag: #a4360b; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #dcdcd8; --paper: #16181b; --soft: #202329; --line: #3a3e45; --faint: #9aa0a8; --link: #7fb4f0;
          --tag: #f0a070; } }
* { box-sizing: border-box; }
html { scroll-padding-top: 1rem; }
body { margin: 0 auto; padding: 1rem; max-width: 110rem; background: var(--paper); color: var(--ink);
       font: 1rem/1.55 system-ui, sans-serif; overflow-wrap: break-word; }
a { color: var(--link); }
h1, h2, h3 { line-height: 1.25; margin: 0 0 .6rem; }
h2 { border-top: 2px solid var(--line); padding-top: 1rem; margin-top: 2rem; font-size: 1.6rem; }
h3 { font-size: 1.1rem; margin-top: 1.2rem; }
p, ul { margin: 0 0 .8rem; }
ul { padding-left: 1.2rem; }
summary { cursor: pointer; margin-bottom: .8rem; }
nav { display: grid; grid-template-columns: repeat(auto-fit, minmax(13rem, 1fr)); gap: 0 1.5rem; font-size: .9rem; }
nav div { margin-bottom: .8rem; }
.row { min-width: 0; margin-bottom: .5rem; }
.row > * { min-width: 0; }
.wide > div > :not(h2, details) { max-width: 62rem; }
.code { margin: .4rem 0 1rem; }
.code p { margin: 0; font-size: .8rem; color: var(--faint); }
pre { margin: 0; padding: .7rem .9rem; overflow-x: auto; background: var(--soft); border-left: 3px solid var(--line);
      font: .8rem/1.5 ui-monospace, "DejaVu Sans Mono", Menlo, Consolas, monospace; tab-size: 4; }
.row > div > pre { margin-bottom: .8rem; }
code { font-family: ui-monospace, "DejaVu Sans Mono", Menlo, Consolas, monospace; font-size: .87em; }
pre code { font-size: 1em; }
pre i { color: var(--faint); font-style: normal; }
pre b { color: var(--tag); }
.scroll { overflow-x: auto; margin-bottom: .9rem; }
table { border-collapse: collapse; font-size: .92rem; }
th, td { border-bottom: 1px solid var(--line); padding: .25rem .8rem .25rem 0; text-align: left; vertical-align: top; }
math { font-size: 1.08em; }
math[display=block] { display: block math; max-width: 100%; overflow-x: auto; overflow-y: hidden; padding: .3rem 0;
                      margin: .2rem 0 .9rem; }
@media (min-width: 70rem) {
  .row { display: grid; grid-template-columns: minmax(0, 2fr) minmax(0, 3fr); column-gap: 2rem; }
  .wide { display: block; }
  td > code { white-space: nowrap; }
  .code { position: sticky; top: 1rem; align-self: start; margin-top: 1.2rem; } }
"""


def slug(title):
    """The anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")


def colour(code):
    """Comments faint, tags in their colour; there is no `#` in the strings of the excerpts."""
    code = re.sub(r"(#.*)$", r"<i>\1</i>", html.escape(code, quote=False), flags=re.M)
    return re.sub(r"(\[[A-Z][\d.]*\])", r"<b>\1</b>", code)


def page(text):
    """Markdown -> the whole page. ImportError where a package is missing."""
    from latex2mathml.converter import convert
    from markdown_it import MarkdownIt

    def dollars(state, silent):
        found = re.compile(r"\$([^$\n]+)\$").match(state.src, state.pos)
        if found and not silent:
            state.push("math", "", 0).content = found[1]
        state.pos = found.end() if found else state.pos
        return bool(found)

    md = MarkdownIt("commonmark").enable("table")
    md.inline.ruler.before("escape", "math", dollars)
    rules = md.renderer.rules
    rules["math"] = lambda tokens, i, options, env: convert(tokens[i].content)
    rules["table_open"] = lambda *_: '<div class="scroll"><table>'
    rules["table_close"] = lambda *_: "</table></div>\n"

    def fence(tokens, i, options, env):
        if tokens[i].info == "math":
            return convert(tokens[i].content.strip(), display="block")
        return f"<pre tabindex=\"0\"><code>{colour(tokens[i].content)}</code></pre>\n"
    rules["fence"] = fence

    rows, left, right, contents = [], [], [], []

    def close():
        if left or right:
            code = f'<div class="code">{"".join(right)}</div>' if right else ""
            prose = md.renderer.render(left, md.options, {})
            rows.append(f'<div class="row{"" if right else " wide"}"><div>{prose}</div>{code}</div>')
        left.clear()
        right.clear()

    tokens, marker = md.parse(text), None
    for i, token in enumerate(tokens):
        found = re.match(r"<!-- code (\S+) (\S+) ([^>]+?) -->", token.content) if token.type == "html_block" else None
        if found:
            marker = f'<p><a href="../{found[1]}">{found[1]}</a> · {found[2]} · {found[3]}</p>'
        elif marker:
            right.append(marker + fence(tokens, i, None, None))
            marker = None
        else:
            if token.type == "heading_open":
                title = tokens[i + 1].content
                token.attrSet("id", slug(title))
                contents.append((token.tag, title))
            if token.type == "heading_open" or right and token.level == 0 and token.nesting >= 0:
                close()
            left.append(token)
    close()
    menu = ""
    for tag, title in contents[1:]:
        menu += ("</div><div>" if menu else "<div>") if tag == "h2" else "<br>"
        menu += f'<a href="#{slug(title)}">{html.escape(title.split(": ", 1)[-1])}</a>'
    menu = f"<details><summary>Contents</summary><nav>{menu}</div></nav></details>"
    body = re.sub(r'href="(?!\w+:|#|\.\./)', 'href="../docs/', "\n".join(rows))  # links beside docs/papers.md
    return (f'<!doctype html>\n<html lang="en-GB">\n<meta charset="utf-8">\n<title>{contents[0][1]}</title>\n'
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            f"<style>{STYLE}</style>\n{body}\n</html>\n").replace("</h1>", "</h1>" + menu, 1)


def main(argv=None):
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args(argv)
    try:
        text = page(SOURCE.read_text())
    except ImportError as error:
        print(f"{error.name} is missing: pip install '.[docs]'", file=sys.stderr)
        return 2
    SITE.parent.mkdir(exist_ok=True)
    SITE.write_text(text)
    print(SITE.relative_to(ROOT))
    return 0


if __name__ == "__main__":
    sys.exit(main())
