"""Collects finished runs of several seeds into the file that the study reads.

    make seeds      trains seeds 0, 1 and 2 and calls this
"""
import json
import sys
from pathlib import Path


def run_record(run):
    """What the study needs of one run folder."""
    read = lambda name: json.loads((run / name).read_text(encoding="utf-8"))
    summary, environment = read("summary.json"), read("environment.json")
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return {
        "seed": environment["seed"],
        "versions": environment["versions"],
        "summary": {k: summary[k] for k in ("steps", "tokens", "mem_peak_gb", "score_before", "score_after")},
        "loss": [[m["step"], m["loss"]] for m in metrics],
        "val_loss": [[m["step"], m["val_loss"]] for m in metrics if "val_loss" in m],
        "answers": read("answers.json"),
    }


if __name__ == "__main__":
    target = Path(__file__).with_name("payments_seeds.json")
    records = [run_record(Path(folder)) for folder in sys.argv[1:]]
    target.write_text(json.dumps(records, ensure_ascii=False, indent=0), encoding="utf-8")
