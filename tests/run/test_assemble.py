"""What a config is made into, and which mistake comes first."""
import json
import shutil

import pytest
import torch
from conftest import run

from qlora_kit.data.files import UserError
from qlora_kit.training.engine import join_ranks
from qlora_kit.training.loop import check_document_isolation
from qlora_kit.run.assemble import make_engine, make_job
from qlora_kit.run.config import config_yaml, load_config


def test_rows_of_a_batch_have_no_pads_on_a_cpu(tiny_config, tmp_path):
    path = tiny_config("joined", training__batch_size=4)
    job = make_job(load_config(path), tmp_path / "run", join_ranks(), base=path.parent)
    sizes = [batch["input_ids"].shape for batch in job.feed.batches(0)]
    assert job.feed.joined and all(B == 1 for B, _ in sizes) and sum(T for _, T in sizes) == job.feed.count(0)[1]


def test_a_model_that_looks_across_documents_pads_the_rows_of_a_cpu(tiny_config, tmp_path):
    """Each token of the first layer is told its predecessor, as in a model with a convolution."""
    path = tiny_config("across", training__batch_size=4)
    for across in (False, True):
        job = make_job(load_config(path), tmp_path / "run", join_ranks(), base=path.parent)
        if across: job.model.get_base_model().model.layers[0].register_forward_pre_hook(lambda layer, args: (args[0] + args[0].roll(1, 1), *args[1:]))
        check_document_isolation(make_engine(job), job.feed)
        assert job.feed.joined is not across and (len(next(job.feed.batches(0))["input_ids"]) > 1) is across


def test_a_bad_row_is_named_before_the_model_is_looked_for(tiny_config, monkeypatch):
    from qlora_kit.run import assemble as module

    path = tiny_config("row")
    rows = json.loads((path.parent / "rows.json").read_text())
    del rows[6]["output"]
    (path.parent / "rows.json").write_text(json.dumps(rows))
    monkeypatch.setattr(module, "resolve_base", lambda *a: pytest.fail("the model was asked for first"))
    with pytest.raises(UserError, match="row 7"):
        run(path)


@pytest.mark.parametrize("said", [None, False, True])
def test_gradients_are_sent_beside_the_backward_pass_only_where_somebody_says_so(tiny_config, tmp_path, said):
    """In the run's config or in a DeepSpeed file; also read back from a run folder."""
    from qlora_kit.run.assemble import deepspeed_config

    choice = {} if said is None else {"deepspeed__overlap_comm": said}
    cfg, place = load_config(tiny_config("overlap", **choice)), join_ranks()
    place.ranks = 2
    assert deepspeed_config(cfg, place, 64)["zero_optimization"]["overlap_comm"] is bool(said)
    again = tmp_path / "again.yaml"  # as a run folder keeps it, every default written down
    again.write_text(config_yaml(cfg))
    assert deepspeed_config(load_config(again), place, 64)["zero_optimization"]["overlap_comm"] is bool(said)
    if said is not None: return
    file = tmp_path / "ds.json"
    file.write_text(json.dumps({"zero_optimization": {"overlap_comm": True}}))
    assert deepspeed_config(cfg, place, 64, str(file))["zero_optimization"]["overlap_comm"] is True


@pytest.mark.parametrize("said, buffers", [("auto", 2), (2, 2), (5, 5)])
def test_how_many_layers_are_whole_at_a_time(tiny_config, tiny_llama, said, buffers):
    from qlora_kit.run.assemble import memory_setup

    cfg = load_config(tiny_config("ring", deepspeed__gathered_layers=said))
    assert memory_setup(cfg, tiny_llama, ranks=2).buffers == buffers
    with pytest.raises(UserError, match="gathered_layers"): load_config(tiny_config("one", deepspeed__gathered_layers=1))


def test_tokens_and_positions_beyond_a_table_are_found_before_the_model_is_loaded(tiny_config, tiny_llama, tmp_path, monkeypatch, capsys):
    """A tokenizer with tokens that the model lacks, a pad token among them, and GPT-2's table of positions; `inspect` says the same."""
    from transformers import AutoTokenizer

    from qlora_kit.run import assemble
    from qlora_kit.tools.commands import run_app

    monkeypatch.setattr(assemble, "build_model", None)
    base = tmp_path / "grown"
    shutil.copytree(tiny_llama, base)
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens(["Count"])
    tokenizer.save_pretrained(base)
    path = tiny_config("grown", model__base_model=str(base))
    with pytest.raises(UserError, match="rows.json row .*: token 'Count' has the id .* embedding has .* rows"): run(path)
    assert run_app(["inspect", str(path)]) == 2 and "token 'Count'" in capsys.readouterr().err
    tokenizer.add_special_tokens(dict(pad_token="<pad>"))
    tokenizer.save_pretrained(base)
    with pytest.raises(UserError, match="pad token '<pad>' has the id"): run(path)
    rows = tmp_path / "long.json"
    rows.write_text(json.dumps([dict(instruction="q", input="", output="word " * 2000)] * 2))
    config = json.loads((base / "config.json").read_text()) | dict(model_type="gpt2", n_positions=1024, vocab_size=1000)
    (base / "config.json").write_text(json.dumps(config))
    path = tiny_config("long", model__base_model=str(base), data__train_file=str(rows), data__validation_split=0, training__max_length=5000)
    with pytest.raises(UserError, match="long.json row 1: .* tokens, and the model has .* positions"): run(path)
