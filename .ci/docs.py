"""Builds the docs site from the notebooks: `_docs`, a folder that opens without a server and asks no other host for anything.

    python .ci/docs.py            (make docs)

nbdev processes the notebooks, Quarto renders them, or smalldocs where no Quarto is found; what follows mends the pages: libraries from npm
packages instead of a content network, relative links, sources beside the pages, a table for every signature, one id once.
"""
import base64
import html
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from urllib.parse import unquote

from bs4 import BeautifulSoup, Comment
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import PythonLexer

ROOT = Path(__file__).resolve().parent.parent
PROC, OUT = ROOT / "_proc", ROOT / "_docs"
KATEX, WIDGETS, HAN = "0.16.11", "1.0.15", "5.3.1"  # npm's katex, @jupyter-widgets/html-manager and @fontsource-variable/noto-sans-sc
CDN = re.compile(r"https://cdn\.jsdelivr\.net/npm/katex@[\d.]+/dist")
MANAGER, FONT = "@jupyter-widgets/html-manager", "@fontsource-variable/noto-sans-sc"
VIEW, STATE = "application/vnd.jupyter.widget-view+json", "application/vnd.jupyter.widget-state+json"
CONTROL = re.compile(r"Slider|Button|Dropdown|Select|Text|Checkbox|Play|Picker|Tags|Combobox|Toggle|Upload")
MOVES = {"en": "A still: its controls work in JupyterLab, where a kernel computes.", "zh": "静态图片：其中的控件在 JupyterLab 里由内核计算后才会动。"}
PREFIX = re.compile(r"^\d\d[a-z]?_")
OLD_PAGES = {  # addresses from before there were chapters: where the page is now, then the pages that took a part of it along
    "data": ["data/rows", "data/files"], "tokens": ["data/tokens"], "batches": ["data/batches"], "inspector": ["data/inspector"],
    "nf4": ["model/nf4"], "explorer": ["model/explorer"], "loader": ["model/loader", "model/base"], "sharded": ["model/sharded"],
    "lora": ["model/lora"], "linear": ["model/linear", "model/experts"], "pointwise": ["model/kernels"],
    "loss": ["training/loss"], "ladder": ["training/recompute"], "zero": ["training/zero"], "engine": ["training/engine"],
    "memory": ["memory/predict", "memory/budget"], "planner": ["memory/planner"],
    "generate": ["use/generate", "use/trained"], "chat": ["use/chat"], "evaluate": ["use/evaluate"], "merge": ["use/merge", "use/export"],
    "config": ["run/config"], "monitor": ["run/monitor"], "trackers": ["run/trackers"], "checkpoint": ["run/checkpoint"],
    "interruptions": ["run/interruptions"], "train": ["run/train", "training/loop", "run/run_folder", "run/assemble", "run/interruptions"],
    "dashboard": ["tools/dashboard"], "compare": ["tools/compare", "tools/sweep"], "bench": ["tools/bench", "tools/clock", "tools/contestants"],
    "launch": ["tools/commands", "tools/processes"],
}
REDIRECT = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>This page has moved</title><link rel="canonical" href="{page}">
<script>const anchors = {anchors}; location.replace((anchors[location.hash.toLowerCase()] || "{page}") + location.hash);</script>
<noscript><meta http-equiv="refresh" content="0; url={page}"></noscript></head>
<body><main><h1>This page has moved</h1><p>It is now <a href="{page}">{page}</a>.</p></main></body></html>
"""


# ---- before rendering: staged copies of the notebooks, and the pages that are generated


def stage():
    """nbdev's processed copies of the notebooks in `_proc`, every figure with a text in its place."""
    shutil.rmtree(PROC, ignore_errors=True)
    from nbdev.serve import proc_nbs

    os.chdir(ROOT)
    sys.path.insert(0, str(ROOT))
    read_annotations_as_written()
    proc_nbs(n_workers=0, force=True)
    silent = [text for page in sorted(PROC.rglob("*.ipynb")) for text in describe_figures(page)]
    if silent:
        raise SystemExit("these cells draw a figure without a text for those who cannot see it; add `#| fig-alt: …`\n\n" + "\n\n".join(silent))


def read_annotations_as_written():
    """A kernel's annotation names its compiler, which is missing where there is no card; such a one is shown as it is written."""
    from fastcore import docments

    known = docments.signature

    def signature(function, eval_str=False, **rest):
        try:
            return known(function, eval_str=eval_str, **rest)
        except NameError:
            return known(function, **rest)

    docments.signature = signature


def describe_figures(page):
    """Give each figure its alt text: `#| fig-alt:` in the cell, or the title that the cell draws above the figure; cells that have neither."""
    silent, notebook = [], json.loads(page.read_text(encoding="utf-8"))
    for cell in notebook["cells"]:
        text = "".join(cell["source"])
        has_image = any("image/png" in output.get("data", {}) for output in cell.get("outputs", []))
        if not has_image or "fig-alt" in text:
            continue
        titles = re.findall(r"""(?:set_title\(|suptitle\(|\.title\(|title=)f?["']([^"']+)["']""", text)
        if not titles:
            silent.append(f"{page.name}: {text}")
            continue
        cell["source"] = f"#| fig-alt: {json.dumps('; '.join(dict.fromkeys(titles)))}\n{text}"
    page.write_text(json.dumps(notebook), encoding="utf-8")
    return silent


def save_widgets():
    """Widgets that a browser moves without a kernel: copies of their pages are executed, and what the widgets hold goes into the staged pages."""
    import nbformat
    from nbclient import NotebookClient
    from traitlets.config import Config

    for page in sorted((ROOT / "nbs").rglob("*.ipynb")):
        notebook = nbformat.read(page, 4)
        shown = [i for i, cell in enumerate(notebook.cells) if cell.cell_type == "code" and re.search(r"^\w*stills$|^Stills\(", cell.source, flags=re.M)]
        if not shown or ".ipynb_checkpoints" in page.parts:
            continue
        notebook.cells = [cell for cell in notebook.cells[: shown[-1] + 1] if "#| eval: false" not in cell.source]
        with tempfile.TemporaryDirectory() as sockets:
            config = Config({"KernelManager": {"transport": "ipc", "ip": f"{sockets}/kernel"}})
            NotebookClient(notebook, timeout=600, kernel_name="python3", config=config, resources={"metadata": {"path": page.parent}}).execute()
        models, live = notebook.metadata["widgets"][STATE]["state"], {}
        for cell in notebook.cells:
            for output in cell.get("outputs", []):
                if VIEW in output.get("data", {}) and (state := live_state(output["data"][VIEW]["model_id"], models)):
                    live[cell.id] = widget_html(output["data"][VIEW]["model_id"], state)
        staged = PROC / page.relative_to(ROOT / "nbs")
        pages = json.loads(staged.read_text(encoding="utf-8"))
        for cell in pages["cells"]:
            if cell.get("id") in live:
                cell["outputs"] = [{"output_type": "display_data", "metadata": {}, "data": {"text/html": live.pop(cell["id"])}}]
        staged.write_text(json.dumps(pages), encoding="utf-8")
        assert not live, f"{page.name}: widgets of {', '.join(live)} were not staged; see save_widgets in .ci/docs.py"


def live_state(root, models):
    """The models that a view needs, if a link in the browser moves each of its controls; None if one of them would be dead."""
    needed, new = set(), {root}
    while new:
        needed |= new
        new = {m for key in new for m in re.findall(r"IPY_MODEL_(\w+)", json.dumps(models[key]["state"]))} - needed
    ends = lambda model: {end[0].removeprefix("IPY_MODEL_") for end in (model["state"].get("source"), model["state"].get("target")) if end}
    links = {key: ends(model) for key, model in models.items() if model["model_name"].endswith("LinkModel")}
    needed |= {key for key, both in links.items() if both <= needed}
    moved = set().union(*(links[key] for key in needed if key in links))
    dead = {key for key in needed - moved if CONTROL.search(models[key]["model_name"]) and not models[key]["model_name"].endswith("StyleModel")}
    return None if dead else {key: models[key] for key in models if key in needed}


def widget_html(root, state):
    """A place for a view, and what it shows, as the widget manager reads them."""
    data = lambda kind, value: f'<script type="{kind}">{json.dumps(value).replace("<", chr(92) + "u003c")}</script>'
    return (f'<div class="live-widget">{data(STATE, {"version_major": 2, "version_minor": 0, "state": state})}'
            f'{data(VIEW, {"version_major": 2, "version_minor": 0, "model_id": root})}</div>')


def exported():
    """{module: [(name, first line of its docstring; None for a constant)]} of the package."""
    import importlib
    import inspect

    names = {}
    for name in pages_of_modules():
        module = importlib.import_module(f"qlora_kit.{name}")
        found = [(n, getattr(module, n)) for n in module.__all__]
        names[name] = [(n, (inspect.getdoc(o) or "").split("\n")[0] if inspect.isroutine(o) or inspect.isclass(o) else None) for n, o in found]
    return names


def chapter_pages():
    """The notebooks that export, in the order of the sidebar, which is that of the data."""
    import yaml

    contents = yaml.safe_load((ROOT / "nbs/_quarto.yml").read_text(encoding="utf-8"))["website"]["sidebar"]["contents"]
    return [ROOT / "nbs" / p for entry in contents if entry.get("section") in CHAPTERS for p in entry["contents"]]


def pages_of_modules():
    """{module: name of the notebook that exports it}."""
    found = {}
    for page in chapter_pages():
        module = re.search(r"#\|\s*default_exp ([\w.]+)", page.read_text(encoding="utf-8"))
        if module:
            found[module[1]] = page.relative_to(ROOT / "nbs").as_posix()
    return found


def api_page():
    """Every exported name, by module, with its first line."""
    pages, parts = pages_of_modules(), ["---\ntitle: Names\ndescription: Every public name of the package, by module, with its first line.\n---\n"]
    for module, names in exported().items():
        page = pages[module]
        parts.append(f"\n## {module}\n\n[The page](../{page}) · `from qlora_kit.{module} import …`\n\n| name | what it does |\n|---|---|")
        parts += [f"| [`{n}`](../{page}{'' if line is None else '#' + n.lower()}) | {_cell('a constant' if line is None else line)} |" for n, line in names]
    return "\n".join(parts)


def config_page():
    """Every key of the config, from the typed classes that check it."""
    from qlora_kit.run.config import RunConfig

    parts = ["---\ntitle: Config keys\ndescription: Every key of a run's YAML file, generated from the classes that check it.\n---\n",
             "Each section is a class on [the page Config](../run/01_config.ipynb). A key without a default must be given.\n"]
    for section, field in RunConfig.model_fields.items():
        parts.append(f"\n## {section}\n\n| key | type | default | meaning |\n|---|---|---|---|")
        said = explanations(field.annotation)
        for key, info in field.annotation.model_fields.items():
            parts.append(f"| `{key}` | {_cell(type_text(info))} | {_cell(default_text(info))} | {_cell(said.get(key, ''))} |")
    return "\n".join(parts)


def explanations(section):
    """{key: the comment beside its line, or on the lines above it}, of a section and those that it extends."""
    said, above = {}, []
    for kind in reversed(section.__mro__):
        if not kind.__module__.startswith("qlora_kit."):
            continue
        for line in inspect.getsource(kind).splitlines():
            code, _, comment = line.partition("# ")
            key = re.match(r"    (\w+): ", code)
            if key:
                said[key[1]] = " ".join([*above, comment]).strip()
            above = [*above, comment] if comment and not code.strip() else []
    return said


def type_text(info):
    """A field's type and range in words."""
    text = re.sub(r"typing\.|<class '|'>|qlora_kit\.run\.config\.", "", str(info.annotation))
    text = re.sub(r"Literal\[(.*?)\]", lambda m: m[1].replace("'", ""), text).replace("Optional", "")
    bounds = [f"{sign} {getattr(m, name)}" for m in info.metadata for name, sign in (("ge", "≥"), ("gt", ">"), ("le", "≤"), ("lt", "<")) if hasattr(m, name)]
    return ", ".join([text, *bounds])


def default_text(info):
    """A field's default as YAML writes it."""
    return "required" if info.is_required() else f"`{json.dumps(info.get_default(call_default_factory=True), ensure_ascii=False)}`"


def _cell(text):
    return str(text).replace("|", "\\|").replace("\n", " ")


def generate():
    """The pages that no notebook holds."""
    (PROC / "reference").mkdir(exist_ok=True)
    (PROC / "reference/names.md").write_text(api_page(), encoding="utf-8")
    (PROC / "reference/config.md").write_text(config_page(), encoding="utf-8")
    chinese = (ROOT / "README.zh.md").read_text(encoding="utf-8")
    chinese = re.sub(r"\]\(nbs/", "](", chinese)
    chinese = re.sub(r"\]\(README\.md\)", "](index.ipynb)", chinese)
    (PROC / "zh.md").write_text("---\nlang: zh\n---\n\n" + chinese, encoding="utf-8")
    for name in ("CHANGELOG.md", "CONTRIBUTING.md", "README.zh.md"):
        (PROC / name).unlink(missing_ok=True)
    for name in ("CHANGELOG.md", "CONTRIBUTING.md"):
        text = (ROOT / name).read_text(encoding="utf-8").replace("](nbs/", "](")
        (PROC / name).write_text(text, encoding="utf-8")


CHAPTERS = {"Data": "数据", "Model": "模型", "Training": "训练", "Memory": "显存", "Use": "使用", "Run": "运行", "Tools": "工具"}
SECTIONS = CHAPTERS | {"Tutorials": "教程", "Studies": "研究"}


def roadmap(up="", chinese=False):
    """The pages as boxes, by the sections of the sidebar, in the order in which data flows; below them what is built on all."""
    import yaml

    contents = yaml.safe_load((ROOT / "nbs/_quarto.yml").read_text(encoding="utf-8"))["website"]["sidebar"]["contents"]
    columns = [(entry["section"], entry["contents"]) for entry in contents if entry.get("section") in SECTIONS]
    gain = lambda text: "" if chinese else f"<small>{html.escape(text)}</small>"  # the pages themselves are in English
    items = lambda pages: "".join(f'<li><a href="{up}{site_name(Path(p)).with_suffix(".html").as_posix()}">{html.escape(title)}{gain(text)}</a></li>'
                                  for p in pages for title, text in [title_of(ROOT / "nbs" / p)])
    column = lambda name, pages: f'<li{"" if name in CHAPTERS else " class=beside"}><span>{SECTIONS[name] if chinese else name}</span><ol>{items(pages)}</ol></li>'
    return f'<ol class="roadmap" aria-label="{"一次运行的路线图" if chinese else "Road map of a run"}">{"".join(column(*c) for c in columns)}</ol>'


def title_of(page):
    """Title of a notebook, and as much of its subtitle as makes sense alone."""
    first = "".join(json.loads(page.read_text(encoding="utf-8"))["cells"][0]["source"])
    clause, *more = re.split(r"[:;.](?= |$)", re.search(r"^> (.+)", first, flags=re.M)[1])[0].split(", ")
    while more and len(clause) < 36:
        clause += f", {more.pop(0)}"
    return re.search(r"^# (.+)", first, flags=re.M)[1], clause


def glossary():
    """{term as written: anchor}, longest first."""
    text = (ROOT / "nbs/reference/glossary.qmd").read_text(encoding="utf-8")
    terms = {t.lower(): a for t, a in re.findall(r"^## (.+?) \{#([\w-]+)\}", text, flags=re.M) if " of a " not in t}
    return dict(sorted(terms.items(), key=lambda item: -len(item[0])))


def link_terms(page, up, terms):
    """The first mention of each term on a page leads to the glossary."""
    left = dict(terms)
    for text in page.select_one("main").find_all(string=True) if page.select_one("main") else []:
        if not left or text.find_parent(["a", "code", "pre", "h1", "h2", "h3", "h4", "script", "style", "figure", "table", "nav", "button", "summary"]) or text.find_parent(class_="math") or not text.find_parent("p"):
            continue
        found = min((m for t in left for m in [re.search(rf"(?<![\w-]){re.escape(t)}(?![\w-])", text, flags=re.I)] if m), key=lambda m: m.start(), default=None)
        if found:
            anchor = left.pop(found[0].lower())
            link = page.new_tag("a", href=f"{up}reference/glossary.html#{anchor}", attrs={"class": "term"})
            link.string = found[0]
            text.replace_with(text[: found.start()], link, text[found.end() :])


# ---- rendering


def render():
    """`_proc` becomes `_proc/_docs`."""
    quarto = shutil.which("quarto")
    command = [quarto, "render", "--no-execute"] if quarto else [sys.executable, "-m", "smalldocs.cli", "render"]
    run = subprocess.run(command, cwd=PROC, capture_output=True, text=True)
    if run.returncode:
        raise SystemExit(run.stdout + run.stderr)
    shutil.rmtree(OUT, ignore_errors=True)
    shutil.move(PROC / "_docs", OUT)


# ---- after rendering


def vendor(package, version, wanted):
    """Files of an npm package, copied into the site's libraries."""
    target, cache = OUT / "site_libs" / package, ROOT / "_proc/npm"
    cache.mkdir(parents=True, exist_ok=True)
    if not shutil.which("npm"):
        raise SystemExit("npm was not found; the site's libraries come from npm packages: install Node.js, then run make docs again")
    packed = subprocess.run(["npm", "pack", "--silent", f"{package}@{version}"], cwd=cache, capture_output=True, text=True)
    if packed.returncode:
        raise SystemExit(f"npm could not fetch {package}@{version}: {packed.stderr.strip()[-300:]}")
    with tarfile.open(cache / packed.stdout.split()[-1]) as archive:
        for member in archive.getmembers():
            path = member.name.removeprefix("package/")
            if member.isfile() and re.match(wanted, path):
                file = target / path.removeprefix("dist/")
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(archive.extractfile(member).read())


def quiet(script):
    """The widget manager checks its state with a schema that its own validator warns of."""
    text, made = script.read_text(encoding="utf-8"), "gt=new(ft()),"
    assert text.count(made) == 1, "the widget manager makes its validator in another way; see quiet in .ci/docs.py"
    script.write_text(text.replace(made, "gt=new(ft())({strictTypes:!1}),"), encoding="utf-8")


def site_name(path):
    """03_nf4.html → nf4.html: addresses do not change when pages are renumbered."""
    return path.with_name(PREFIX.sub("", path.name))


def rename_pages():
    """{old relative path: new one} after renaming the files."""
    moved = {}
    for page in sorted(OUT.rglob("*.html")):
        new = site_name(page)
        if new.exists() and new != page:
            raise SystemExit(f"two pages would be {new.relative_to(OUT)}; rename one of the notebooks")
        page.rename(new)
        moved[page.relative_to(OUT).as_posix()] = new.relative_to(OUT).as_posix()
    return moved


def add_sources():
    """Coloured sources with a numbered anchor on each line, and the notebooks themselves."""
    (OUT / "source").mkdir()
    for file in (ROOT / "qlora_kit").glob("[a-z]*/[a-z]*.py"):
        where = OUT / "source" / file.relative_to(ROOT / "qlora_kit").with_suffix(".html")
        where.parent.mkdir(exist_ok=True)
        formatter = HtmlFormatter(full=True, linenos="inline", lineanchors="L", anchorlinenos=False, title=f"qlora_kit/{file.parent.name}/{file.name}", style="friendly")
        where.write_text(highlight(file.read_text(encoding="utf-8"), PythonLexer(), formatter).replace("<html>", '<html lang="en">'), encoding="utf-8")
    for page in (ROOT / "nbs").rglob("*.ipynb"):
        if ".ipynb_checkpoints" not in page.parts:
            target = OUT / "notebooks" / page.relative_to(ROOT / "nbs")
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(page, target)
    carry_kit(OUT / "notebooks/tutorials/colab.ipynb")


def carry_kit(page):
    """A notebook to upload anywhere: its first code cell writes the kit as a wheel, from text inside the notebook, and the next one finds it there."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, "-m", "pip", "wheel", "-q", "--disable-pip-version-check", "--no-deps", "-w", folder, str(ROOT)], check=True)
        [wheel] = Path(folder).glob("qlora_kit-*.whl")
        text = base64.b64encode(wheel.read_bytes()).decode()
    notebook = json.loads(page.read_text(encoding="utf-8"))
    where = next(i for i, cell in enumerate(notebook["cells"]) if cell["cell_type"] == "code")
    source = f"from base64 import b64decode\nfrom pathlib import Path\n\n# {wheel.name}, {len(text)//1024} kB of text\nPath({wheel.name!r}).write_bytes(b64decode({text!r}));"
    cell = {"cell_type": "code", "id": "kit", "execution_count": None, "metadata": {"jupyter": {"source_hidden": True}, "cellView": "form"}, "outputs": [], "source": source}
    notebook["cells"].insert(where, cell)
    page.write_text(json.dumps(notebook, ensure_ascii=False, indent=1), encoding="utf-8")


def new_link(href, here, moved, modules):
    """Where a link of a page should lead, relative to that page."""
    up = "../" * here.count("/")
    if found := re.match(r"(?:\.\./)*/?blob/main/qlora_kit/([\w/]+)\.py(?:#L(\d+))?$", href):
        return f"{up}source/{found[1]}.html" + (f"#L-{found[2]}" if found[2] else "")
    if found := re.match(r"/([\w/]+)\.html(#.*)?$", href):
        return f"{up}{found[1]}.html{found[2] or ''}"
    if re.match(r"[a-z]+:|//", href) or not href:
        return href
    path, mark, anchor = href.partition("#")
    anchor = re.sub(r"[^\w.-]", "", unquote(anchor)).lower()  # Jupyter's anchors are headings as written, the site's are their slugs
    if not path:
        return mark + anchor
    target = Path(os.path.normpath((Path(here).parent / path).as_posix())).as_posix()
    if target in ("README.zh.md", "README.zh.html"):
        target = "zh.html"
    if target.endswith((".ipynb", ".md", ".qmd")):
        target = target.rpartition(".")[0] + ".html"
    target = moved.get(target, target)
    return os.path.relpath(target, Path(here).parent.as_posix() or ".") + mark + anchor


def signature_table(code):
    """(one line, rows of (name, type, default, meaning), (type, meaning) of what comes back) of a `def` with docments."""
    lines = code.strip().split("\n")
    head = re.match(r"def (\w+)\(", lines[0])
    if not head or len(lines) < 2:
        return None
    rows, back = [], None
    for line in lines[1:]:
        found = re.match(r"\s+(\*{0,2}\w+)(?::(.+?))?(?:=(.+?))?,?\s*(?:# ?(.*))?$", line)
        if end := re.match(r"\)(?:->\s*(.+?))?:?\s*(?:# ?(.*))?$", line.strip()):
            back = (end[1], end[2])
        elif found:
            rows.append(tuple(part or "" for part in found.groups()))
    kind = lambda t: re.sub(r"__main__\.|torch\.Tensor|[\w.]+\.(?=[A-Z]\w+$)", lambda m: "Tensor" if m[0] == "torch.Tensor" else "", t or "").rstrip(":")
    return head[1], [(n, kind(t), d, doc) for n, t, d, doc in rows], (kind(back[0]), back[1] or "") if back else None


def tabulate(page):
    """Signatures of documented names become tables: argument, type, default, meaning with shape and unit."""
    for heading in page.select("h3[id]"):
        block = heading.find_next_sibling()
        code = block.select_one("code") if block is not None and block.name == "div" else None
        found = signature_table(code.get_text()) if code and code.get_text().lstrip().startswith(f"def {heading.get_text(strip=True)}(") else None
        if not found:
            continue
        name, rows, back = found
        call = ", ".join(n + (f"={d}" if d else "") for n, _, d, _ in rows)
        text = lambda s: html.escape(s).replace("`", "")
        body = "".join(f"<tr><td><code>{text(n)}</code></td><td>{text(t)}</td><td>{text(d)}</td><td>{text(doc)}</td></tr>" for n, t, d, doc in rows)
        if back and (back[0] or back[1]):
            body += f'<tr class="returns"><td>returns</td><td>{text(back[0])}</td><td></td><td>{text(back[1])}</td></tr>'
        table = (f'<div class="signature"><pre><code>{text(name)}({text(call)})</code></pre><table class="table table-sm"><thead><tr><th>argument</th><th>type</th>'
                 f"<th>default</th><th>meaning</th></tr></thead><tbody>{body}</tbody></table></div>")
        block.replace_with(BeautifulSoup(table, "html.parser"))


def unique_ids(page):
    """Ids that stand twice get a number; links lead to the first."""
    seen = set()
    for element in page.select("[id]"):
        if element["id"] in seen:
            n = next(n for n in range(2, 1000) if f"{element['id']}-{n}" not in seen)
            element["id"] = f"{element['id']}-{n}"
            if element.has_attr("data-anchor-id"):
                element["data-anchor-id"] = element["id"]
        seen.add(element["id"])


def caption(page, still):
    """Below the picture of a widget: that it is one, and where it moves."""
    figure, words = still.find_parent("figure"), page.new_tag("span", attrs={"class": "still"})
    words.string = MOVES.get(page.html.get("lang"), MOVES["en"])
    if figure is None:
        still.insert_after(page.new_tag("br"), words)
    elif figure.figcaption is None:
        figure.append(page.new_tag("figcaption"))
        figure.figcaption.append(words)
    else:
        figure.figcaption.extend([" " if figure.figcaption.get_text().rstrip().endswith(".") else ". ", words])


def mend(file, moved, modules):
    """One page: local libraries, links, tables, ids."""
    here = file.relative_to(OUT).as_posix()
    up = "../" * here.count("/")
    page = BeautifulSoup(CDN.sub(f"{up}site_libs/katex", file.read_text(encoding="utf-8")), "html.parser")
    tabulate(page)
    for spot in page.find_all(string=lambda text: isinstance(text, Comment) and text.strip() == "roadmap"):
        spot.replace_with(BeautifulSoup(roadmap(up, here == "zh.html"), "html.parser"))
    if not here.startswith(("reference/", "CHANGELOG", "CONTRIBUTING", "zh")):
        link_terms(page, up, glossary())
    for element in page.select('a[href*="#_"]'):
        element.unwrap()  # nbdev links every name it knows, private ones too, which have no place on their page
    for element in page.select("a[href]"):
        element["href"] = new_link(element["href"], here, moved, modules)
    for still in page.select('img[src*="images/"]'):
        if re.search(r"_(light|dark)\.png$", still["src"]):
            caption(page, still)
    if page.select_one(f'script[type="{VIEW}"]'):
        page.body.append(page.new_tag("script", src=f"{up}site_libs/{MANAGER}/embed.js"))
    if page.html.get("lang") == "zh":  # in pieces, of which a browser fetches those it needs
        page.head.append(page.new_tag("link", rel="stylesheet", href=f"{up}site_libs/{FONT}/wght.css"))
    for script in page.select("script[src]"):
        script["defer"] = ""  # nothing is painted later for it
    for table in page.select("table"):
        if table.find_parent(class_="table-scroll") is None:
            table.wrap(page.new_tag("div", attrs={"class": "table-scroll"}))
    origin = next((old for old, new in moved.items() if new == here), here)
    notebook = Path(origin).with_suffix(".ipynb")
    title = page.select_one("#title-block-header") or page.select_one("header")
    if (ROOT / "nbs" / notebook).exists() and title is not None:
        title.append(BeautifulSoup(f'<p class="page-links"><a href="{up}notebooks/{notebook}" download>notebook</a></p>', "html.parser"))
    unique_ids(page)
    file.write_text(str(page), encoding="utf-8")


def mend_libraries(moved):
    """No font from elsewhere, and an index of the search that also loads from a folder."""
    for css in (OUT / "site_libs").rglob("*.css"):
        text = css.read_text(encoding="utf-8")
        css.write_text(re.sub(r"@import url\(https?://[^)]*\);", "", text), encoding="utf-8")
    index = json.loads((OUT / "search.json").read_text(encoding="utf-8"))
    for entry in index:
        for key in ("objectID", "href"):
            path, mark, anchor = entry[key].partition("#")
            entry[key] = moved.get(path, path) + mark + anchor
    (OUT / "search.json").write_text(json.dumps(index, ensure_ascii=False), encoding="utf-8")
    script = OUT / "site_libs/smalldocs.js"
    if not script.exists():
        return
    (OUT / "search.js").write_text(f"window.searchIndex = {json.dumps(index, ensure_ascii=False)};", encoding="utf-8")
    fetched = 'const r = await fetch(offset + "search.json");\n      index = await r.json();'
    text = script.read_text(encoding="utf-8")
    assert text.count(fetched) == 1, "smalldocs loads its index in another way; see mend_libraries in .ci/docs.py"
    loaded = ('await new Promise((done, fail) => { const s = document.createElement("script"); s.src = offset + "search.js"; s.onload = done; s.onerror = fail; '
              "document.head.append(s); });\n      index = window.searchIndex;")
    script.write_text(text.replace(fetched, loaded), encoding="utf-8")


def redirect():
    """The addresses that pages had before there were chapters lead to where their lessons are now, and their anchors with them."""
    names = {module: [n.lower() for n, _ in found] for module, found in exported().items()}
    module_of = {site_name(Path(page)).with_suffix("").as_posix(): module for module, page in pages_of_modules().items()}
    for old, (first, *others) in OLD_PAGES.items():
        others = [new for new in others if new in module_of]
        anchors = {f"#{name}": f"{new}.html" for new in others for name in names[module_of[new]]}
        (OUT / f"{old}.html").write_text(REDIRECT.format(page=f"{first}.html", anchors=json.dumps(anchors)), encoding="utf-8")


def build():
    """Everything, in order."""
    stage()
    save_widgets()
    generate()
    render()
    vendor("katex", KATEX, r"dist/(katex\.min\.(css|js)|contrib/auto-render\.min\.js|fonts/.*\.woff2)$")
    vendor(MANAGER, WIDGETS, r"dist/(embed\.js|.*\.woff2)$")
    quiet(OUT / "site_libs" / MANAGER / "embed.js")
    vendor(FONT, HAN, r"(LICENSE|wght\.css|files/.*\.woff2)$")
    moved, modules = rename_pages(), pages_of_modules()
    add_sources()
    for file in sorted(OUT.rglob("*.html")):
        if "source" not in file.relative_to(OUT).parts:
            mend(file, moved, modules)
    mend_libraries(moved)
    redirect()
    print(f"{len(moved)} pages in {OUT.relative_to(ROOT)}; open {OUT.relative_to(ROOT)}/index.html")


if __name__ == "__main__":
    build()
