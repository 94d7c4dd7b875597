"""Notebooks, package, script templates and README agree, and what is committed is clean."""
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_export_changes_nothing(tmp_path):
    copy = tmp_path / "kit"
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".venv", ".git", "runs", "__pycache__", "*.egg-info", ".pytest_cache"))
    subprocess.run([sys.executable, str(ROOT / ".ci/export.py"), str(copy)], cwd=copy, check=True, capture_output=True, text=True)
    exported = [*copy.glob("qlora_kit/**/*.py"), *copy.glob("qlora_kit/assets/**/*.tpl"), copy / "README.md", copy / "README.zh.md"]
    differ = [str(f.relative_to(copy)) for f in exported if not (ROOT / f.relative_to(copy)).exists() or f.read_bytes() != (ROOT / f.relative_to(copy)).read_bytes()]
    assert not differ, f"run `make export`: {differ}"


def test_both_readmes_show_what_was_measured_and_lead_to_the_same_pages():
    english, chinese = ((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "README.zh.md"))
    lines = [json.loads(line) for line in (ROOT / "nbs/studies/peers.jsonl").read_text(encoding="utf-8").splitlines()]
    last = {(x["who"], x["setting"]): x for x in lines if (x["task"], x["shape"], x["B"], x["T"]) == ("tokens", "llama-3.1-8b", 4, 2048)}
    for text in (english, chinese):
        for x in last.values():
            if x.get("tokens_per_s"):
                assert f"| {x['tokens_per_s']:,.0f} |" in text and f"| {x['peak_gb']:.1f} |" in text and f"{x['card']}, {x['date']}" in text
    links = lambda text: set(re.findall(r"\]\((nbs/[^)#]+|C[A-Z]+\.md)", text))
    assert links(english) == links(chinese)
    blocks = lambda text: {line for line in re.findall(r"^    .+|^\{.+|^import.+|^from.+", text, flags=re.M) if "inference.py" not in line and "instruction" not in line}
    assert blocks(english) == blocks(chinese)


def test_every_module_has_a_page():
    pages = {m[1] for p in (ROOT / "nbs").rglob("*.ipynb") for m in re.finditer(r"#\| default_exp ([\w.]+)", p.read_text(encoding="utf-8"))}
    modules = {f"{p.parent.name}.{p.stem}" for p in (ROOT / "qlora_kit").glob("[a-z]*/[a-z]*.py")}
    assert modules == pages


def test_stored_outputs_are_clean():
    for page in (ROOT / "nbs").rglob("*.ipynb"):
        for cell in json.loads(page.read_text(encoding="utf-8"))["cells"]:
            for output in cell.get("outputs", []):
                text = json.dumps({k: v for k, v in output.get("data", {}).items() if k != "image/png"}) + "".join(output.get("text", []))
                found = re.search(r"/(root|home|tmp|work)/|Warning|Traceback|it/s|\\u001b\[", text)
                assert not found, f"{page.name}: a stored output holds {found[0]!r}: {text[max(0, found.start() - 60):found.end() + 60]}"
                assert output["output_type"] != "error", f"{page.name} stores an error"


IN_PLACE = re.compile(r"\.write_text\(|\.write_bytes\(|\bopen\([^()]*[\"'][rb]*[wxa+][bt+]*[\"']|\bcopyfile\(|\bcopy2\(|\bsafe_dump\([^()]*,\s*\w*file|\bjson\.dump\(")
NOT_READ_AGAIN_OR_UNDER_ANOTHER_NAME = {
    "files.py": ['with open(temp, "wb") as f:'],  # the atomic writer
    "monitor.py": ['open(Path(folder)/"metrics.jsonl", "a"'],  # grows by whole lines; a torn last one is dropped
    "base.py": ["shutil.copyfile(file, folder/file.name)", "(folder/INDEX).write_text("],  # in a folder that gets its name in the end
    "lora.py": ['(new/"base.json").write_text(', '(new/RECORD).write_text('],
    "merge.py": ["(folder/INDEX).write_text(", "(folder/name).write_text("],
    "predict.py": ['(Path(folder)/"config.json").write_text(text'],  # a temporary folder
    "processes.py": ['(mailbox/"output").open("wb")'],  # what a process prints
    "interruptions.py": ['file = path.open("w")'],  # holds nothing but its lock
    "bench.py": ['log.open("wb")', 'open(job["answer"], "a"', 'open(asked.out, "a"'],  # prints, and lines
    "clock.py": ['open(folder/f"layer-{i}.safetensors", "wb")'],  # prints, lines, and what shape.json vouches for
}


def test_files_are_written_whole_or_not_at_all():
    """Whoever writes over a file that is read again loses it in a kill: `write_atomic`, or a folder that gets its name in the end."""
    found = [(path.name, line.strip()) for path in (ROOT / "qlora_kit").glob("*/*.py") for line in path.read_text(encoding="utf-8").splitlines() if IN_PLACE.search(line)]
    assert len(found) > 8, "the pattern finds nothing any more"
    wrong = [f"{name}: {line}" for name, line in found if not any(allowed in line for allowed in NOT_READ_AGAIN_OR_UNDER_ANOTHER_NAME.get(name, []))]
    assert not wrong, "\n".join(wrong)
