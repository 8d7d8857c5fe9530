"""The pages: their links and pictures are there, and README.md is short; what docs/papers.md shows is the source's, its
sums are right, and it opens in a browser."""

import ast
import html.parser
import importlib.util
import io
import math
import re
import shutil
import subprocess
import sys
import tokenize
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import common
import moco
import rotnet
import simclr
import simsiam

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "docs" / "papers.md").read_text()
FILES = ["simsiam.py", "moco.py", "simclr.py", "rotnet.py"]
SECTIONS = {part.splitlines()[0]: part for part in re.split(r"^###? ", TEXT, flags=re.M)}


def program(name):
    """docs/build.py or docs/page.py as a module."""
    spec = importlib.util.spec_from_file_location(f"docs_{name}", ROOT / "docs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


build, page = program("build"), program("page")

# ------------------------------------------------------------------------------------------------
# All pages, as GitHub shows them
# ------------------------------------------------------------------------------------------------

PAGES = [ROOT / name for name in ("README.md", "RESULTS.md", "CONTRIBUTING.md")] + sorted(ROOT.glob("docs/*.md"))
IMAGES = sorted((ROOT / "docs" / "images").iterdir())


def targets(path):
    """What a page links to or shows, without addresses of the web."""
    text = re.sub(r"```.*?```", "", path.read_text(), flags=re.S)
    return re.findall(r"""(?:\]\(|(?:src|href)=")(?!https?:)([^)"]+)""", text)


def anchors(path):
    """GitHub's, of a page's headings."""
    text = re.sub(r"```.*?```", "", path.read_text(), flags=re.S)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
            for heading in re.findall(r"^#+ (.*?) *$", text, flags=re.M)}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_of_a_page_lead_somewhere(page):
    for target in targets(page):
        file, _, anchor = target.partition("#")
        path = page.parent / file if file else page
        assert path.exists(), target
        assert path.resolve().is_relative_to(ROOT), target
        if anchor:
            assert anchor in anchors(path), target


def test_every_page_is_reached_from_the_readme():
    reached = {(ROOT / target.partition("#")[0]).resolve() for target in targets(ROOT / "README.md")}
    assert set(PAGES) - reached == {ROOT / "README.md"}


def test_pictures_are_small_shown_and_made_by_a_command():
    shown = {(page.parent / target).resolve() for page in PAGES for target in targets(page)}
    makefile = (ROOT / "Makefile").read_text()
    assert IMAGES and sum(path.stat().st_size for path in IMAGES) < 1_000_000
    for path in IMAGES:
        assert path in shown and f"$(IMAGES)/{path.name}" in makefile, path.name
        with Image.open(path) as image:
            assert min(image.size) > 200


def lines_of_code(path):
    """Those that hold more than a comment or a docstring."""
    text, blank = path.read_text(), {"COMMENT", "NL", "NEWLINE", "INDENT", "DEDENT", "ENDMARKER"}
    code, documented = set(), (ast.Module, ast.ClassDef, ast.FunctionDef)
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if tokenize.tok_name[token.type] not in blank:
            code.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, documented) and ast.get_docstring(node):
            code.difference_update(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return len(code)


def test_the_readme_is_short_and_says_what_is_so():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 150
    assert re.search(r"^<!-- results -->\n\|.*\n<!-- /results -->$", text, flags=re.M | re.S)
    for file in FILES:  # lines of code, docstrings and comments left out
        said = re.search(rf"^\| \[{file}\].*\| (\d+) \|$", text, flags=re.M)[1]
        lines = lines_of_code(ROOT / file)
        assert abs(lines - int(said)) <= 10, f"{file}: {lines} lines, {said} in README.md"


def test_the_version_stands_in_one_place():
    assert len(re.findall(r"^version = ", (ROOT / "pyproject.toml").read_text(), flags=re.M)) == 1
    citation = (ROOT / "CITATION.cff").read_text()
    assert "\nversion" not in citation and "doi" not in citation
    assert {"cff-version", "message", "title", "authors"} <= set(re.findall(r"^([\w-]+):", citation, flags=re.M))


# ------------------------------------------------------------------------------------------------
# Code
# ------------------------------------------------------------------------------------------------


def test_the_blocks_are_those_of_the_source(capsys):
    assert build.main(["--check"]) == 0, capsys.readouterr().out
    assert len(build.MARKER.findall(TEXT)) == TEXT.count("<!-- code") == TEXT.count("```python")


def test_a_block_that_drifts_is_named_and_made_anew(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(build, "PAGE", tmp_path / "papers.md")
    build.PAGE.write_text(TEXT.replace("z = z.detach() ", "z = z.clone() "))
    assert build.main(["--check"]) == 1
    assert "<!-- code simsiam.py negative_cosine E1 E3 -->" in capsys.readouterr().out
    assert build.PAGE.read_text() != TEXT
    assert build.main([]) == 0 and build.PAGE.read_text() == TEXT
    build.PAGE.write_text(re.sub(r"^```python\n.*?^```\n", "", TEXT, flags=re.M | re.S))  # markers alone
    assert build.main([]) == 0 and build.PAGE.read_text() == TEXT


@pytest.mark.parametrize("file", FILES)
def test_every_tag_has_its_place(file):
    """All tags of the header have a marker, and every line of the code with a tag is in a block of its own file."""
    source = (ROOT / file).read_text()
    header = source[:source.index('"""', 3)]
    markers = {tag for name, _, tags in build.MARKER.findall(TEXT) if name == file for tag in tags.split()}
    assert markers == set(re.findall(r"\[([A-Z][\d.]*)\]", header))
    shown = {line.strip() for m in build.MARKER.finditer(TEXT) if m[1] == file for line in m[0].splitlines()}
    lines = source.splitlines()
    assert [lines[number - 1] for number, *_ in build.tagged(source) if lines[number - 1].strip() not in shown] == []


SOURCE = '''
class Net:
    """What it is.  [S1]

    More.
    """

    def forward(self, x):
        a = 1
        if x:
            # one  [E1]
            b = 2
            c = 3

            d = 4
        # two, which
        # has  [E2] two lines
        e = 5
        f = 6  # not tagged
        for i in x:  # [E3]
            g = 7
        return e


def main():
    # first  [A1]
    a = (1,
         2)
    b = 2
    c = 3  # [A1]
    d = 4
'''


@pytest.mark.parametrize("name, tags, lines", [
    ("Net", ["S1"], ["class Net:", '"""What', '..."""', "", "def forward", "a =", "if x", "# one", "b =", "c =", "",
                     "d =", "# two", "# has", "e =", "f =", "for", "g =", "return"]),
    ("Net.forward", ["E1"], ["if x:", "# one", "b =", "c ="]),        # to the blank line, and the condition comes along
    ("Net.forward", ["E2"], ["# two", "# has", "e =", "f =", "for", "g =", "return"]),  # the whole comment
    ("Net.forward", ["E3"], ["for i in x:"]),                         # of a loop its first line
    ("main", ["A1"], ["# first", "a =", "2)", "b =", "c ="]),         # from the first to the last
])
def test_what_belongs_to_a_tag(name, tags, lines):
    found = build.excerpt(SOURCE, name, tags).splitlines()
    assert len(found) == len(lines), found
    for line, start in zip(found, lines, strict=True):
        assert line.strip().startswith(start) and bool(line) == bool(start)


def test_a_long_gap_is_left_out_and_a_missing_tag_named():
    source = "def main():\n    a = 1  # [E1]\n" + "    b = 2\n" * 9 + "    c = 3  # [E1]\n"
    assert build.excerpt(source, "main", ["E1"]) == "a = 1  # [E1]\n...\nc = 3  # [E1]\n"
    assert build.excerpt(source.replace("    b = 2\n", "", 1), "main", ["E1"]).count("b = 2") == 8
    with pytest.raises(LookupError, match="E9"):
        build.excerpt(source, "main", ["E1", "E9"])


# ------------------------------------------------------------------------------------------------
# Formulas and figures
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", [*PAGES, ROOT / "results/log.md"], ids=lambda page: page.name)
def test_no_line_of_a_paragraph_begins_with_a_comment(page):
    """There Markdown ends the paragraph."""
    assert not re.search(r"^<!-- figure", page.read_text(), flags=re.M)


def test_formulas_are_safe_on_github():
    """There Markdown takes a backslash before punctuation out of $...$, and some commands are refused."""
    prose = re.sub(r"^```.*?^```$", "", TEXT, flags=re.M | re.S)
    assert prose.count("$") % 2 == 0
    for formula in re.findall(r"\$([^$\n]+)\$", prose):
        assert not re.search(r"\\[^a-zA-Z]|[|]|^\s|\s$", formula), formula
    assert len(re.findall(r"\$[^$\n]+\$", prose)) == prose.count("$") // 2, "a formula over two lines"
    assert "operatorname" not in TEXT and "\\begin" not in TEXT


@pytest.mark.parametrize("file", FILES)
def test_figures_of_ablations_stand_in_the_header_or_in_results(file):
    name, = (title for title in SECTIONS if title.lower() == f"{file[:-3]}: try it")
    after = SECTIONS[name].rsplit("```", 1)[1]
    figures = set(re.findall(r"\d+\.\d+", after))
    known = (ROOT / file).read_text().split('"""')[1] + (ROOT / "RESULTS.md").read_text()
    assert figures and figures <= set(re.findall(r"\d+\.\d+", known))


# ------------------------------------------------------------------------------------------------
# Steps by hand
# ------------------------------------------------------------------------------------------------


def evaluate(words, names=()):
    return eval(words, {"__builtins__": {}}, {"exp": math.exp, "log": math.log, "sqrt": math.sqrt, **dict(names)})


def by_hand(name):
    """The first table of a section as {column: (2, ...) float64}, {name: value} of the second, all lines checked."""
    section, inputs, values = SECTIONS[f"{name} by hand"], {}, {}
    head, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")]
                      for line in re.search(r"^\| image.*?(?=\n\n)", section, flags=re.M | re.S)[0].splitlines()]
    for column, *cells in list(zip(head, *rows, strict=True))[1:]:
        inputs[column] = torch.tensor([evaluate(cell) for cell in cells], dtype=torch.float64, requires_grad=True)
    lines = re.findall(r"^\| `(\w+)` \|.*\| `([^`]+)` \| (-?\d+\.\d{4}) \|$", section, flags=re.M)
    for key, arithmetic, value in lines:
        values[key] = evaluate(arithmetic, values)
        assert abs(values[key] - float(value)) < 5.1e-5, f"{name}: {key} = {values[key]}, not {value}"
    assert len(values) == len(lines) == len(re.findall(r"^\| `", section, flags=re.M)) > 10
    return inputs, values


def agree(values, expected):
    assert values.keys() == expected.keys()
    for key, value in expected.items():
        assert values[key] == pytest.approx(torch.as_tensor(value).item(), abs=2e-6), key


@pytest.fixture
def logits(monkeypatch):
    """What a loss hands to F.cross_entropy."""
    seen, real = [], F.cross_entropy
    monkeypatch.setattr(F, "cross_entropy", lambda x, y: (seen.append(x.detach()), real(x, y))[1])
    return seen


def test_simsiam_by_hand():
    inputs, values = by_hand("SimSiam")
    z1, p1, z2, p2 = (inputs[name] for name in ("z1", "p1", "z2", "p2"))
    cosines = [-simsiam.negative_cosine(p[i:i + 1], z[i:i + 1]) for p, z in ((p1, z2), (p2, z1)) for i in range(2)]
    loss = simsiam.symmetric_loss(p1, z1, p2, z2)
    loss.backward()
    assert z1.grad is None and z2.grad is None  # Eq. 3
    turned, = torch.autograd.grad(simsiam.symmetric_loss(p1, z1, p2, z2, stop_gradient=False), z2)
    agree(values, {**dict(zip(("c1", "c2", "c3", "c4"), cosines, strict=True)),
                   "D1": simsiam.negative_cosine(p1, z2), "D2": simsiam.negative_cosine(p2, z1), "L": loss,
                   "gx": p1.grad[0, 0], "gy": p1.grad[0, 1], "along": p1[0] @ p1.grad[0],
                   "zx": turned[0, 0], "zy": turned[0, 1], "std": simsiam.output_std(z1)})


def test_moco_by_hand(logits):
    inputs, values = by_hand("MoCo")
    section = SECTIONS["MoCo by hand"]
    rows = re.search(r"queue: (.*)\.\n", section)[1]
    queue, temperature = torch.tensor(evaluate(f"[{rows}]"), dtype=torch.float64), 0.5
    assert f"$\\tau = {temperature}$, $K = {len(queue)}$" in section
    q, k = inputs["q"], inputs["k"].detach()
    loss = moco.info_nce(q, k, queue, temperature)
    loss.backward()
    (a, b), = logits
    one, two = (moco.info_nce(q[i:i + 1], k[i:i + 1], queue, temperature) for i in range(2))
    key = torch.ones(1)
    moco.ema_update([key], [2 * torch.ones(1)], 0.99)
    same = torch.ones(4, 2, dtype=torch.float64)
    agree(values, {**{f"a{i}": a[i] for i in range(4)}, **{f"b{i}": b[i] for i in range(4)},
                   "A": a.exp().sum(), "B": b.exp().sum(), "L1": one, "L2": two, "L": loss,
                   "chance": moco.info_nce(same[:1], same[:1], same[1:], temperature),
                   "gx": q.grad[0, 0], "gy": q.grad[0, 1], "theta_k": key,
                   "accuracy": moco.contrastive_accuracy(q, k, queue)})
    model = moco.MoCo(common.ResNet18(width=8), dim=2, queue_size=3, bn_splits=1)
    model.queue.copy_(queue)
    model.enqueue(k.float())
    words = ", ".join(f"({x:g}, {y:g})" for x, y in model.queue.tolist())
    assert f"makes the queue {words}, and the pointer stands at its last row" in section and int(model.pointer) == 2


def test_simclr_by_hand():
    inputs, values = by_hand("SimCLR")
    z1, z2, temperature = inputs["z1"], inputs["z2"], 0.5
    assert f"$\\tau = {temperature}$" in SECTIONS["SimCLR by hand"]
    loss = simclr.nt_xent(z1, z2, temperature)
    loss.backward()
    s, positive = simclr.similarities(z1.detach(), z2.detach())
    rows = F.cross_entropy(s / temperature, positive, reduction="none")
    s.requires_grad_()
    pull, = torch.autograd.grad(4 * temperature * F.cross_entropy(s / temperature, positive), s)
    same = torch.ones(2, 2)
    agree(values, {**{f"s{i + 1}{j + 1}": s[i, j] for i in range(4) for j in range(i + 1, 4)},
                   **{f"S{i + 1}": (s[i] / temperature).exp().sum() for i in range(4)},
                   **{f"l{i + 1}{positive[i] + 1}": rows[i] for i in range(4)}, "L": loss,
                   "chance": simclr.nt_xent(same, same, temperature),
                   **{f"w{j + 1}": pull[0, j] + pull[j, 0] for j in range(1, 4)},
                   "gx": z1.grad[0, 0], "gy": z1.grad[0, 1], "accuracy": simclr.contrastive_accuracy(z1, z2)})


def test_rotnet_by_hand():
    inputs, values = by_hand("RotNet")
    right, others = (column.detach() for column in inputs.values())
    y = torch.arange(4).repeat_interleave(2)                                   # rows k*N + i, as of rotation_batch
    logits = torch.where(F.one_hot(y, 4).bool(), right.repeat(4)[:, None], others.repeat(4)[:, None]).requires_grad_()
    loss = rotnet.focal_loss(logits, y)
    loss.backward()
    plain = [rotnet.focal_loss(logits[i::2], y[i::2]) for i in range(2)]
    focal = [rotnet.focal_loss(logits[i::2], y[i::2], gamma=2, alpha=0.5) for i in range(2)]
    agree(values, {"p1": logits.softmax(dim=1)[0, 0], "p2": logits.softmax(dim=1)[1, 0],
                   "L1": plain[0], "L2": plain[1], "L": loss,
                   "g1": logits.grad[0, 0], "o1": logits.grad[0, 3], "g2": logits.grad[1, 0], "o2": logits.grad[1, 3],
                   "F1": focal[0], "F2": focal[1], "F": rotnet.focal_loss(logits, y, gamma=2, alpha=0.5),
                   "part": plain[0] / sum(plain), "part_f": focal[0] / sum(focal)})


def test_the_rotated_picture():
    section = SECTIONS["RotNet: Section 3.2, the rotations"]
    table = [[cell.split() for cell in line.strip("|").split("|")[1:]]
             for line in re.findall(r"^\| (?:class|first|second).*$", section, flags=re.M)]
    x4, y4 = rotnet.rotation_batch(torch.tensor([[[[1, 2], [3, 4]]]]))
    assert [int(y) for y, in table[0]] == y4.tolist()
    for row in range(2):
        assert [[int(pixel) for pixel in cell] for cell in table[1 + row]] == x4[:, 0, row].tolist()


# ------------------------------------------------------------------------------------------------
# The page
# ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def drawn():
    pytest.importorskip("markdown_it", reason="markdown-it-py is not installed; only docs/page.py needs it")
    pytest.importorskip("latex2mathml", reason="latex2mathml is not installed; only docs/page.py needs it")
    return page.page(TEXT)


def test_links_and_anchors_lead_somewhere(drawn):
    class Reader(html.parser.HTMLParser):
        anchors, targets, open = [], [], []

        def handle_starttag(self, tag, attributes):
            attributes = dict(attributes)
            self.anchors += [attributes["id"]] if "id" in attributes else []
            self.targets += [attributes[key] for key in ("href", "src") if key in attributes]
            if tag not in ("meta", "br"):
                self.open.append(tag)

        def handle_startendtag(self, tag, attributes):
            assert tag == "mspace" and "id" not in dict(attributes)

        def handle_endtag(self, tag):
            assert self.open.pop() == tag

    reader = Reader()
    reader.feed(drawn)
    assert reader.open == [] and len(set(reader.anchors)) == len(reader.anchors)
    assert len(reader.targets) > 50
    for target in reader.targets:
        if target.startswith("#"):
            assert target[1:] in reader.anchors, target
        elif not target.startswith("https://"):
            assert (ROOT / "site" / target).resolve().exists(), target
    formulas = len(re.findall(r"\$[^$\n]+\$", TEXT)) + TEXT.count("```math")
    assert drawn.count("<math") == formulas and "$" not in drawn and "\\" not in re.sub(r"<pre.*?</pre>", "", drawn)
    assert drawn.count('class="code"') <= drawn.count("<pre") == TEXT.count("```") // 2 - TEXT.count("```math")


def test_a_missing_package_is_one_line(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "latex2mathml.converter", None)
    monkeypatch.setattr(page, "SITE", None)
    assert page.main([]) == 2
    said = capsys.readouterr().err
    assert "pip install '.[docs]'" in said and said.count("\n") == 1


def open_in_browser(path, profile):
    """The page's document after loading, and what its console said."""
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
    if browser is None:
        pytest.skip("no Chromium or Chrome: the page has not been opened in a browser")
    done = subprocess.run([browser, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={profile}",
                           "--enable-logging=stderr", "--virtual-time-budget=2000", "--dump-dom", path.as_uri()],
                          capture_output=True, text=True, timeout=120)
    return done.stdout, re.findall(r"CONSOLE.*", done.stderr)


def test_the_page_opens_without_an_error_and_fits_a_phone(drawn, tmp_path):
    path = tmp_path / "index.html"
    path.write_text(drawn)
    document, said = open_in_browser(path, tmp_path / "profile")
    assert said == [] and 'id="moco-by-hand"' in document
    # The same page in a frame of 390 pixels; its width is reported on the console, which also shows that this is heard.
    frame = html.escape(drawn, quote=True)
    path.write_text(f'<iframe width="390" height="800" srcdoc="{frame}"></iframe><script>onload = () => console.error('
                    '"width", document.querySelector("iframe").contentDocument.documentElement.scrollWidth)</script>')
    _, said = open_in_browser(path, tmp_path / "profile")
    assert len(said) == 1 and int(re.search(r"width (\d+)", said[0])[1]) <= 390, said
