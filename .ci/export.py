"""What `make export` writes from the notebooks: the package, the script templates, the README, and the measured table of the Chinese one.

    python .ci/export.py [FOLDER]     FOLDER: the checkout to export (default: this one)
"""
import json
import os
import re
import sys
from pathlib import Path

CHINESE = {"|   | setting | tokens a second | kit × | GB at the peak |": "|   | 设置 | 词元/秒 | 倍数 | 显存峰值 GB |", "its checkpointing": "自带的重算", "checkpointing": "逐层重算",
           "nothing recomputed": "不重算", "(": "（", ")": "）"}


def source(cell):
    return "".join(cell["source"])


def export_templates(root):
    """Fenced Python in a page's text that begins with `# scripts/NAME` becomes a file of the scaffold; as text it does not run with the page."""
    for page in sorted((root / "nbs").rglob("[0-9]*.ipynb")):
        for cell in json.loads(page.read_text(encoding="utf-8"))["cells"]:
            if cell["cell_type"] != "markdown":
                continue
            for name, body in re.findall(r"^```python\n# (scripts/\S+)\n(.*?)^```$", source(cell), flags=re.M | re.S):
                head = f"# Generated from nbs/{page.parent.name}/{page.name} of qlora_kit; it calls the kit and holds no logic of its own.\n"
                target = root / "qlora_kit/assets/scaffold" / f"{name}.tpl"
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_text(head + body, encoding="utf-8")


def output_text(output):
    """The plain form of a stored output."""
    data = output.get("data", {})
    if "text/markdown" in data:
        return "".join(data["text/markdown"])
    text = "".join(output.get("text", data.get("text/plain", "")))
    return "\n".join("    " + line for line in text.rstrip().splitlines())


def export_readme(root):
    """nbs/index.ipynb as Markdown; cells flagged `#| hide` are left out, with their outputs."""
    page = json.loads((root / "nbs/index.ipynb").read_text(encoding="utf-8"))
    parts = []
    for cell in page["cells"]:
        text = source(cell)
        if cell["cell_type"] == "markdown":
            parts.append(text)
        elif not re.search(r"^#\|\s*hide\s*$", text, flags=re.M):
            if "#| echo: false" not in text:
                parts.append(f"```python\n{text}\n```")
            parts += [output_text(o) for o in cell["outputs"]]
    body = "\n\n".join(p.strip("\n") for p in parts if p.strip())
    body = re.sub(r"\]\(([\w/]+)\.ipynb", r"](nbs/\1.ipynb", body)
    body = body.replace("](images/", "](nbs/images/")
    (root / "README.md").write_text(body + "\n", encoding="utf-8")
    table = next((output_text(o) for cell in page["cells"] for o in cell.get("outputs", []) if "text/markdown" in o.get("data", {})), "")
    for english, chinese in CHINESE.items():
        table = table.replace(english, chinese)
    readme = root / "README.zh.md"
    text = re.sub(r"(<!-- peers -->\n).*?(<!-- /peers -->)", lambda m: f"{m[1]}\n{table}\n\n{m[2]}", readme.read_text(encoding="utf-8"), flags=re.S)
    readme.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    root = Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parent.parent).resolve()
    os.chdir(root)
    sys.argv[1:] = []  # nbdev would read them
    from nbdev.doclinks import nbdev_export

    nbdev_export()
    export_templates(root)
    if (root / "nbs/index.ipynb").exists():
        export_readme(root)
