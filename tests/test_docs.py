"""The built site in a real browser: every page, every link, no other host, search, texts for figures. `make docs-test` builds it first."""
import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from urllib.parse import unquote, urldefrag

import pytest
from bs4 import BeautifulSoup

ROOT = Path(__file__).parent.parent
SITE = ROOT / "_docs"
pytestmark = pytest.mark.docs
CHROMIUM = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"]


def pages():
    return sorted(p for p in SITE.rglob("*.html") if not {"site_libs", "source"} & {*p.relative_to(SITE).parts})


def soup(page):
    return BeautifulSoup(page.read_text(encoding="utf-8"), "html.parser")


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as p:
        started = p.chromium.launch(executable_path="/usr/bin/chromium", args=CHROMIUM)
        yield started
        started.close()


def test_every_notebook_has_its_page_and_every_page_stands_in_the_sidebar():
    names = {re.sub(r"^\d\d[a-z]?_", "", p.stem) for p in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts}
    assert names <= {p.stem for p in pages()}
    listed = {a["href"].split("/")[-1].split("#")[0] for a in soup(SITE / "index.html").select("#quarto-sidebar a[href]")}
    assert {f"{n}.html" for n in names} <= listed


def test_links_lead_somewhere():
    ids, broken = {}, []
    for page in pages():
        for a in soup(page).select("a[href]"):
            href, anchor = urldefrag(a["href"])
            if re.match(r"[a-z]+:", href):
                continue
            target = (page.parent / unquote(href)).resolve() if href else page
            if not target.exists():
                broken.append(f"{page.relative_to(SITE)} → {a['href']}")
            elif anchor and target.suffix == ".html":
                if target not in ids:
                    ids[target] = {e["id"] for e in soup(target).select("[id]")}
                if unquote(anchor) not in ids[target]:
                    broken.append(f"{page.relative_to(SITE)} → {a['href']}")
    assert not broken, "\n".join(sorted(set(broken)))


def test_no_page_asks_another_host_or_complains(browser):
    tab, asked, said = browser.new_page(), [], []
    tab.on("request", lambda r: asked.append(r.url))
    tab.on("console", lambda m: said.append(f"{tab.url}: {m.text}") if m.type in ("error", "warning") else None)
    tab.on("pageerror", lambda e: said.append(f"{tab.url}: {e}"))
    tab.on("requestfailed", lambda r: said.append(f"{r.url} failed: {r.failure}") if "ERR_ABORTED" not in r.failure else None)  # aborted: the next page came
    for page in pages():
        tab.goto(page.as_uri(), wait_until="load")
    elsewhere = {u for u in asked if not u.startswith(("file://", "data:"))}
    tab.close()
    assert not elsewhere and not said, [*elsewhere, *said]


def test_search_finds_names_and_headings(browser):
    from playwright.sync_api import expect

    tab = browser.new_page()
    tab.goto((SITE / "studies/payments.html").as_uri())
    for word in ("nf4_codebook", "load_model", "add_lora", "LossModel", "zero_config", "DeepSpeedEngine", "Monitor", "save_checkpoint", "exact_match", "RunConfig"):
        tab.keyboard.press("/")
        box = tab.locator(".smalldocs-search input").first
        box.fill(word)
        first = tab.locator(".search-result").first
        expect(first, word).to_contain_text(word, timeout=5000)
        assert (SITE / "studies" / first.get_attribute("href").split("#")[0]).resolve().exists()
    tab.close()


def test_the_index_of_the_search_knows_every_public_name():
    sections = {e["section"] for e in json.loads((SITE / "search.json").read_text(encoding="utf-8"))} | set()
    names = {a.get_text() for a in soup(SITE / "reference/names.html").select("main td a code")}
    text = (SITE / "search.json").read_text(encoding="utf-8")
    assert len(names) > 100 and not [n for n in names if n not in sections and n not in text]


def test_every_config_key_is_listed():
    from qlora_kit.run.config import RunConfig

    cells = {c.get_text() for c in soup(SITE / "reference/config.html").select("main td:first-child code")}
    assert cells == {key for field in RunConfig.model_fields.values() for key in field.annotation.model_fields}
    meanings = [c.get_text().strip() for c in soup(SITE / "reference/config.html").select("main td:last-child")]
    assert all(meanings), "a key without a meaning: write it beside the key on the page config"


def test_figures_have_texts_ids_are_unique_and_headings_in_order():
    wrong = []
    for page in pages():
        doc, name = soup(page), page.relative_to(SITE)
        wrong += [f"{name}: no alt text" for image in doc.select("img") if not image.get("alt", "").strip()]
        wrong += [f"{name}: id {i} stands {n} times" for i, n in Counter(e["id"] for e in doc.select("[id]")).items() if n > 1]
        levels = [int(h.name[1]) for h in doc.select("main h1, main h2, main h3, main h4")]
        wrong += [f"{name}: heading of level {b} after {a}" for a, b in zip(levels, levels[1:]) if b > a + 1]
        wrong += [f"{name}: {levels.count(1)} titles"] if levels.count(1) != 1 else []
        wrong += [] if doc.html.get("lang") else [f"{name}: no language"]
    assert not wrong, "\n".join(wrong)


def test_formulas_are_drawn(browser):
    """No link stands inside of a formula, and each has become a drawing."""
    tab, broken = browser.new_page(), []
    for path in sorted(SITE.rglob("*.html")):
        formulas = soup(path).select(".math")
        broken += [f"{path.name}: {f}" for f in formulas if f.find(True)]
        if formulas:
            tab.goto(path.as_uri())
            tab.wait_for_function("document.querySelectorAll('.math .katex').length >= 1")
            left = tab.evaluate("[...document.querySelectorAll('.math')].filter(f => !f.querySelector('.katex') || f.querySelector('.katex-error')).map(f => f.textContent)")
            broken += [f"{path.name}: {text}" for text in left]
    tab.close()
    assert not broken, broken


def test_the_first_page_is_light_and_nothing_holds_up_its_painting():
    page = SITE / "index.html"
    doc = soup(page)
    files = [page, *[(page.parent / e[k]).resolve() for e, k in [(e, "src") for e in doc.select("script[src], img[src]") if not e["src"].startswith("data:")]
                     + [(e, "href") for e in doc.select("link[rel=stylesheet]")]]]
    assert sum(f.stat().st_size for f in files) <= 1.5e6, {f.name: f.stat().st_size for f in files}
    assert not [s for s in doc.select("script[src]") if not s.has_attr("defer") and not s.has_attr("async")]


def luminance(rgb):
    linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in (v / 255 for v in rgb)]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


CONTRAST = """selector => [...document.querySelectorAll(selector)].filter(e => e.offsetParent && e.textContent.trim()).slice(0, 60).map(e => {
  let b = e, back = "rgba(0, 0, 0, 0)";
  while (b && /, 0\\)$|transparent/.test(back)) { back = getComputedStyle(b).backgroundColor; b = b.parentElement; }
  return [e.tagName + "." + e.className + ": " + e.textContent.trim().slice(0, 30), getComputedStyle(e).color, back]; })"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_is_legible_in_both_themes(browser, scheme):
    """At least 4.5 : 1, what WCAG 2.1 asks of text of this size."""
    tab, weak = browser.new_page(color_scheme=scheme), []
    for name in ("index", "model/nf4", "run/train", "reference/config", "studies/payments"):
        tab.goto((SITE / f"{name}.html").as_uri())
        tab.wait_for_timeout(200)
        for what, front, back in tab.evaluate(CONTRAST, "main p, main td, main th, pre code, pre code span, #quarto-sidebar a, main a, #quarto-margin-sidebar a"):
            a, b = (luminance([float(v) for v in re.findall(r"[\d.]+", c)[:3]]) for c in (front, back if "0, 0, 0, 0" not in back else "rgb(255,255,255)"))
            ratio = (max(a, b) + 0.05) / (min(a, b) + 0.05)
            if ratio < 4.5:
                weak.append(f"{scheme} {name} {what!r}: {ratio:.1f} ({front} on {back})")
    tab.close()
    assert not weak, "\n".join(sorted(set(weak)))


def test_the_notebook_for_colab_brings_the_kit_along(tmp_path):
    """Alone in an empty folder, with a Python that has no kit: its first cells write a wheel, choose it, and the kit in it is this one."""
    cells = [c for c in json.loads((SITE / "notebooks/tutorials/colab.ipynb").read_text(encoding="utf-8"))["cells"] if c["cell_type"] == "code"]
    source = ["".join(c["source"]) for c in cells]
    choose = next(i for i, s in enumerate(source) if "def source()" in s)
    code = "\n".join(source[:choose + 1]).replace('find_spec("qlora_kit") is None', "find_spec('no kit') is None")
    code = code.replace('"install", "-q", source()', '"install", "-q", "--no-deps", "--target", "here", source()')
    run = lambda *words: subprocess.run([sys.executable, *words], cwd=tmp_path, check=True, capture_output=True, text=True).stdout
    (tmp_path / "cells.py").write_text(code, encoding="utf-8")  # too long for a command line
    run("cells.py")
    assert run("-c", "import sys; sys.path.insert(0, 'here'); import qlora_kit; print(qlora_kit.__file__)").strip().startswith(str(tmp_path))
    files = lambda kit: {f.relative_to(kit).as_posix(): f.read_bytes() for f in kit.rglob("*") if f.is_file() and "__pycache__" not in f.parts}
    assert files(tmp_path / "here/qlora_kit") == files(ROOT / "qlora_kit")


OLD = """data tokens batches inspector nf4 explorer loader sharded lora linear pointwise loss ladder memory planner zero engine monitor trackers checkpoint
generate chat evaluate config interruptions train merge launch dashboard compare bench""".split()


def test_addresses_from_before_the_chapters_lead_to_the_pages_now(browser):
    """A link with the anchor of a name that has moved to another page follows it there."""
    tab, at = browser.new_page(), {}
    for old in OLD:
        tab.goto((SITE / f"{old}.html").as_uri())
        tab.wait_for_url(re.compile(r"/(data|model|training|memory|use|run|tools)/\w+\.html$"), timeout=5000)
        at[old] = tab.url.rpartition(SITE.as_uri())[2]
        assert tab.locator("#title-block-header, header h1, main h1").count(), at[old]
    assert at["ladder"] == "/training/recompute.html" and at["data"] == "/data/rows.html"
    for link, place in (("data.html#write_atomic", "/data/files.html#write_atomic"), ("loader.html#load_tokenizer", "/model/base.html#load_tokenizer"),
                        ("memory.html#smallest_change", "/memory/budget.html#smallest_change")):
        tab.goto(f"{SITE.as_uri()}/{link}")
        tab.wait_for_url(re.compile(re.escape(place)), timeout=5000)
    tab.close()


def test_widgets_move_without_a_kernel_or_say_that_they_are_stills(browser):
    """A slider of saved state changes what stands below it; a picture of a widget says where it moves; no control is dead."""
    tab, moved = browser.new_page(), {}
    for page in pages():
        doc, name = soup(page), page.relative_to(SITE).as_posix()
        for still in doc.select('img[src*="_light.png"], img[src*="_dark.png"]'):
            assert "A still" in still.find_parent("figure").get_text(), f"{name}: {still['src']}"
        if not doc.select(".live-widget"):
            assert not [s for s in doc.select("script[src]") if "html-manager" in s["src"]], f"{name} loads what it does not need"
            continue
        tab.goto(page.as_uri())
        box = tab.locator(".live-widget").first
        box.locator(".noUi-handle").focus()
        before = box.inner_text()
        tab.keyboard.press("ArrowRight")
        after = box.inner_text()
        assert len(before) > 50 and len(after) > 50 and before != after, f"{name}: the slider turns no page"
        assert box.get_by_role("button").count() == 0
        moved[name] = True
    tab.close()
    assert set(moved) >= {"data/inspector.html", "model/explorer.html"}


def test_the_diagram_leads_to_every_page():
    import yaml

    contents = yaml.safe_load((ROOT / "nbs/_quarto.yml").read_text(encoding="utf-8"))["website"]["sidebar"]["contents"]
    listed = {p for entry in contents for p in entry.get("contents", []) if isinstance(p, str) and p.endswith(".ipynb")}
    assert {p.relative_to(ROOT / "nbs").as_posix() for p in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts} == listed | {"index.ipynb"}
    for name in ("index.html", "zh.html"):
        boxes = [a["href"] for a in soup(SITE / name).select(".roadmap a")]
        assert boxes == [re.sub(r"(^|/)\d\d[a-z]?_", r"\1", p).replace(".ipynb", ".html") for entry in contents for p in entry.get("contents", [])
                         if isinstance(p, str) and p.endswith(".ipynb")], name


QUARTO = {  # key: its type or its values, from quarto-dev/quarto-cli, src/resources/schema
    "project.type": ("default", "website", "book", "manuscript"), "project.output-dir": str,  # project.yml; closed: another key is an error
    "format.html.theme.light": str, "format.html.theme.dark": str, "format.html.css": str,  # document-options.yml; closed below theme
    "format.html.toc": bool, "format.html.toc-depth": int,  # document-toc.yml
    "format.html.lang": str,  # document-language.yml
    "website.title": str, "website.description": str, "website.page-navigation": bool, "website.search": bool,  # definitions.yml, base-website; closed
    "website.sidebar.style": ("docked", "floating"), "website.sidebar.contents": list,  # the same
}


def test_quarto_knows_every_key_of_the_configuration():
    """Where Quarto is missing smalldocs builds the site, by rules of its own; Quarto would stop at other keys, or pass over them in silence."""
    import yaml

    def leaves(value, path=()):
        return [leaf for k, v in value.items() for leaf in leaves(v, (*path, k))] if isinstance(value, dict) else [(".".join(path), value)]

    fits = lambda value, allowed: value in allowed if isinstance(allowed, tuple) else type(value) is allowed
    found = leaves(yaml.safe_load((ROOT / "nbs/_quarto.yml").read_text(encoding="utf-8")))
    wrong = [f"{key}: {value!r}; allowed: {QUARTO.get(key, 'no such key in the table')}" for key, value in found if key not in QUARTO or not fits(value, QUARTO[key])]
    assert not wrong, "\n".join(wrong)


def test_both_first_pages_have_the_same_parts():
    english, chinese = soup(SITE / "index.html"), soup(SITE / "zh.html")
    shape = lambda doc: [(e.name, len(e.select("tr"))) for e in doc.select("main h2, main table, main .roadmap, main img")]
    assert shape(english) == shape(chinese)
    hrefs = lambda doc: {a["href"] for a in doc.select("main p a, main td a") if not re.match(r"[a-z]+:|#", a["href"]) and "term" not in a.get("class", [])}
    assert hrefs(english) ^ hrefs(chinese) <= {"zh.html", "index.html", "notebooks/index.ipynb"}


def test_the_chinese_page_brings_its_letters(browser):
    """A browser without Chinese fonts finds them in the site."""
    tab = browser.new_page()
    tab.goto((SITE / "zh.html").as_uri())
    faces = tab.evaluate("async () => { await document.fonts.ready; return [...document.fonts].filter(f => f.family.includes('Noto Sans SC') && f.status === 'loaded').length }")
    tab.close()
    assert faces > 5
