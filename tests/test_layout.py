"""The house: chapters stand in the order in which data flows, and a page imports only from pages above it."""
import ast
import builtins
import json
import re
from pathlib import Path

import yaml

ROOT = Path(__file__).parent.parent
CHAPTERS = ("data", "model", "training", "memory", "use", "run", "tools")


def chapter_pages():
    """The pages that export, in the order of the sidebar."""
    contents = yaml.safe_load((ROOT / "nbs/_quarto.yml").read_text(encoding="utf-8"))["website"]["sidebar"]["contents"]
    listed = [page for entry in contents for page in entry.get("contents", []) if isinstance(page, str)]
    return [ROOT / "nbs" / page for page in listed if page.split("/")[0] in CHAPTERS]


def code_cells(page):
    cells = json.loads(page.read_text(encoding="utf-8"))["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]


def module_of(page):
    found = (re.match(r"#\| default_exp ([\w.]+)", source) for source in code_cells(page))
    return next(match[1] for match in found if match)


def imported(source):
    """The kit's modules that a cell imports, wherever in it the import stands."""
    source = re.sub(r"^\s*[%!].*$", "pass", source, flags=re.M)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("qlora_kit."):
            inner = node.module.removeprefix("qlora_kit.")
            yield from [inner] if "." in inner else [f"{inner}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            yield from (a.name.removeprefix("qlora_kit.") for a in node.names if a.name.startswith("qlora_kit."))


def upward(pages):
    """[(page, module below it that it imports)], and what every page imports."""
    order = {module_of(page): i for i, page in enumerate(pages)}
    wrong = []
    for i, page in enumerate(pages):
        for source in code_cells(page):
            wrong += [(page.stem, module) for module in imported(source) if order.get(module, -1) > i]
    return wrong


def test_a_page_imports_only_from_pages_above_it():
    assert upward(chapter_pages()) == []


def test_chapters_stand_in_the_order_of_the_data():
    found = [page.parent.name for page in chapter_pages()]
    assert found == sorted(found, key=CHAPTERS.index)
    assert {page.stem for page in (ROOT / "nbs").glob("*/[0-9]*.ipynb")} == {page.stem for page in chapter_pages()}


def test_the_order_is_really_read():
    """Turned around, nearly every page imports from below."""
    assert len({page for page, _ in upward(chapter_pages()[::-1])}) > 20


def test_a_cell_that_imports_stands_alone():
    """The site is built by running a page's imports and exported cells alone, so such a cell uses no name of the examples before it."""
    wrong = []
    for page in chapter_pages():
        exported = {name for source in code_cells(page) if re.match(r"#\| exports?\b", source) for name in bound(ast.parse(source))}
        known = {*dir(builtins), *exported}
        for source in code_cells(page):
            tree = ast.parse(re.sub(r"^\s*[%!].*$", "pass", source, flags=re.M))
            imports = any(isinstance(node, ast.Import | ast.ImportFrom) for node in ast.walk(tree))
            if not imports or re.match(r"#\| (exports?|eval: false)\b", source) or "nbdev_export" in source: continue
            used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
            known |= bound(tree)
            wrong += [f"{page.stem}: {name}" for name in sorted(used - known)]
    assert wrong == []


def bound(tree):
    """The names that a piece of code binds."""
    nodes = list(ast.walk(tree))
    aliases = {(a.asname or a.name).partition(".")[0] for node in nodes if isinstance(node, ast.Import | ast.ImportFrom) for a in node.names}
    defined = {node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    stored = {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    arguments = {node.arg for node in nodes if isinstance(node, ast.arg)}
    return aliases | defined | stored | arguments


def test_papers_are_listed_once_and_all_that_pages_cite_are_there():
    cited = set()
    for page in (ROOT / "nbs").rglob("*.ipynb"):
        if ".ipynb_checkpoints" not in page.parts:
            cited |= set(re.findall(r"(?:arXiv:?\s*|arxiv\.org/abs/)(\d{4}\.\d{4,5})", page.read_text(encoding="utf-8")))
    listed = re.findall(r"\[arXiv (\d{4}\.\d{4,5})\]", (ROOT / "nbs/reference/papers.qmd").read_text(encoding="utf-8"))
    assert len(listed) == len(set(listed)) and cited <= set(listed), cited - set(listed)
