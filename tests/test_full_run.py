"""One command trains, measures and reports: each stage once, the finished never again, the stopped from its place."""

import gzip
import io
import json
import runpy
import shutil
import signal
import subprocess
import sys
from contextlib import redirect_stdout
from importlib import import_module
from pathlib import Path
from unittest import mock

import pytest
from lab import ENVIRONMENT, ROOT, TOKENIZER, small_model, wait_for

from benchmarks import dry_run, full_run
from model.cli import UserError, run_main
from model.weights import save_weight
from scripts.lib import stages

SMALL = ("--sample_scale=0.01", "--every=96", "--set", "all.max_steps=2", "all.device=cpu",
         *(f"{stage}.{change}" for stage in ("grpo", "agent") for change in (
             "num_generations=2", "accumulation_steps=1", "max_gen_len=4")))


def run_here(script: str, flags: dict, show: bool = True) -> str:
    """A script in this process: nothing to import again."""
    output = io.StringIO()
    with mock.patch.object(sys, "argv", stages.command(script, flags)), redirect_stdout(output):
        runpy.run_path(str(ROOT / script), run_name="__main__")
    return output.getvalue()


def start(folder: Path, *flags: str, preset: str = "tiny") -> None:
    argv = ["full_run.py", f"--preset={preset}", f"--save_dir={folder}", f"--report_dir={folder / 'report'}", *flags]
    with mock.patch.object(sys, "argv", argv), mock.patch.object(signal, "signal"):
        full_run.main()


@pytest.fixture(scope="module")
def lived(tmp_path_factory) -> Path:
    """The folder of a toy that has gone through all stages."""
    folder = tmp_path_factory.mktemp("lived")
    (folder / "eval").mkdir()
    questions = [{"query": f"Question: {word}?", "choices": ["yes", "no"], "gold": gold}
                 for gold, word in enumerate(("right", "wrong"))]
    (folder / "eval/arc_easy.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in questions * 96))
    (folder / "tiny").mkdir()
    save_weight(small_model(hidden_size=128), "full_sft", folder / "tiny", TOKENIZER)  # of another run
    (folder / "long_zh.txt.gz").write_bytes(gzip.compress("从前有一只狐狸。".encode() * 40))
    with mock.patch.object(full_run, "run", run_here), mock.patch.object(full_run, "LENGTHS", [260, 270]):
        start(folder, f"--data={folder}", *SMALL)
    return folder


def test_a_toy_goes_through_all_stages_and_the_report_tells_what_each_took_and_gained(lived):
    found = json.loads((lived / "report/tiny.json").read_text("utf-8"))
    stages, text = found["stages"], (lived / "report/tiny.md").read_text("utf-8")
    trained = [name for name in full_run.STAGES if name not in full_run.OPTIONAL]
    assert list(stages) == ["data", *trained, "evaluation"] and all(stage["done"] for stage in stages.values())
    for name in trained:
        log, = (lived / "tiny/logs").glob(f"{name}_64.jsonl")
        rows, stage = [json.loads(line) for line in log.read_text().splitlines()], stages[name]
        assert stage["tokens"] == rows[-1]["tokens"] > 0 and stage["steps"] == 2
        assert stage["tokens_per_s"] > 0 and 0 < stage["mfu"] < 1 and stage["memory_gb"] > 0
        assert rows[0]["step"] == 0 and stage["before"] == {k: v for k, v in rows[0].items() if k[:4] == "val_"}
        assert stage["after"] == {k: v for k, v in rows[-1].items() if k[:4] == "val_"} != {}
        assert stage["yuan"] == pytest.approx(stage["seconds"] / 3600 * 1.3) and f"| {name} | " in text
    assert stages["grpo"]["seconds_a_step"]["rollout"] > 0
    evaluation, chats = stages["evaluation"], {"full_sft", "lora_identity", "dpo", "grpo", "agent"}
    assert set(evaluation["answers"]) == set(evaluation["sampled"]) == set(evaluation["exam"]) == chats
    assert len(full_run.PROMPTS) == 20
    assert all(set(answers) == set(full_run.PROMPTS) for answers in evaluation["answers"].values())
    assert set(evaluation["bits_per_byte"]) == set(evaluation["benchmarks"]) == {"pretrain", *chats}
    assert evaluation["benchmarks"]["pretrain"]["arc"]["questions"] == 2 and "| guessing | 50.0% |" in text
    assert len(evaluation["context"]["yarn"]) == 2 and "| with YaRN | " in text
    assert all((lived / f"report/tiny_{number}.png").stat().st_size > 5000 for number in (1, 2, 3))
    assert not list((lived / "tiny/data").glob("*pretrain.jsonl"))  # tokens are what is carried


def test_what_is_done_is_not_done_again_unless_it_would_become_something_else(lived, tmp_path, capsys):
    scripts, lived = [], shutil.copytree(lived, tmp_path / "carried")
    with mock.patch.object(full_run, "run", lambda script, *_, **__: scripts.append(script) or ""), \
            mock.patch.object(full_run, "evaluate", lambda *_: {}), mock.patch.object(full_run, "write_report"):
        start(lived, *SMALL)
        assert scripts == []
        assert capsys.readouterr().out.count("already done") == len(full_run.NAMES) - len(full_run.OPTIONAL)
        start(lived, *SMALL, "full_sft.weight_decay=0.2")
    said = capsys.readouterr().out
    assert scripts == [f"trainer/train_{name}.py" for name in (
        "full_sft", "lora", "dpo", "reward", "grpo", "agent")]
    assert "full_sft: starts over: --weight_decay was 0.1, is 0.2" in said and "pretrain: already done" in said
    assert "dpo: starts over: what it starts from was made anew" in said
    assert not list((lived / "tiny/checkpoints").glob("dpo_*"))  # the state of the old one is gone


@pytest.mark.parametrize("preset", ["tiny", "zero"])
def test_with_experts_the_same_stages_make_a_model_of_its_own_beside_the_dense_one(tmp_path, preset):
    ran, reported = {}, mock.Mock()
    with mock.patch.object(full_run, "run", lambda script, flags, **_: ran.update({script: flags}) or ""), \
            mock.patch.object(full_run, "prepare", return_value={}), \
            mock.patch.object(full_run, "evaluate", return_value={}), \
            mock.patch.object(full_run, "write_report", reported):
        start(tmp_path, "--moe", preset=preset)
    assert list(ran) == [f"trainer/train_{name}.py" for name in (
        "pretrain", "full_sft", "lora", "dpo", "reward", "grpo", "agent")]
    assert [script for script, flags in ran.items() if "use_moe" in flags] == ["trainer/train_pretrain.py"]
    assert ran["trainer/train_pretrain.py"]["use_moe"] == 1  # the others take it from the weight they begin with
    assert {flags["save_dir"] for flags in ran.values()} == {tmp_path / f"{preset}_moe"}
    assert reported.call_args.args[:2] == (f"{preset}_moe", tmp_path / f"{preset}_moe")
    assert json.loads((tmp_path / f"{preset}_moe/run.json").read_text())["agent"]["done"]


def test_a_run_that_was_stopped_goes_on_where_it_was(lived, tmp_path):
    shutil.copytree(lived / "tiny/data", tmp_path / "tiny/data")
    done_before = json.loads((lived / "tiny/run.json").read_text())["data"]
    (tmp_path / "tiny/run.json").write_text(json.dumps({"data": done_before}))
    command = [sys.executable, ROOT / "benchmarks/full_run.py", "--preset=tiny", f"--save_dir={tmp_path}",
               f"--report_dir={tmp_path}", "--stages", "data", "pretrain", "--sample_scale=0.01", "--set",
               "pretrain.device=cpu", "pretrain.log_interval=1", "pretrain.save_interval=5"]
    log, runs = tmp_path / "tiny/logs/pretrain_64.jsonl", tmp_path / "tiny/run.json"
    process = subprocess.Popen([*command, "pretrain.max_steps=5000", "pretrain.epochs=200"], env=ENVIRONMENT, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    wait_for(lambda: log.exists() and '"step": 3' in log.read_text(), process)
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 130, said
    record = json.loads(runs.read_text())["pretrain"]
    stopped_at = json.loads(log.read_text().splitlines()[-1])["step"]
    assert not record["done"] and record["seconds"] > 0 and stopped_at < 5000
    state, = (tmp_path / "tiny/checkpoints").glob("pretrain_64_resume.pth")
    records = json.loads(runs.read_text())
    records["pretrain"]["flags"]["max_steps"] = str(stopped_at + 3)  # as if it had been asked for no more
    runs.write_text(json.dumps(records))
    done = subprocess.run([*command, f"pretrain.max_steps={stopped_at + 3}", "pretrain.epochs=200"], env=ENVIRONMENT,
                          text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert done.returncode == 0 and f"resume: continuing after step {stopped_at}" in done.stdout, done.stdout
    assert "data: already done" in done.stdout and state.exists()
    after = json.loads(runs.read_text())["pretrain"]
    assert after["done"] and after["seconds"] > record["seconds"]
    assert [json.loads(line)["step"] for line in log.read_text().splitlines()] == list(range(stopped_at + 4))


class Parsed(Exception):
    pass


@pytest.mark.parametrize("preset", ["demo", "tiny", "cpu", "zero", "full"])
def test_the_scripts_take_the_flags_of_every_preset(tmp_path, monkeypatch, preset):
    args = mock.Mock(preset=preset, moe=True, set=[("all", "seed", "3")])
    recipe = {stage.name: stage.sample_flags | stage.data_flags(tmp_path) for stage in stages.STAGES} \
        if preset == "demo" else full_run.recipe(args, tmp_path)
    for stage in (stage for stage in stages.STAGES if stage.name in recipe):
        module = import_module(stage.script.removesuffix(".py").replace("/", "."))
        seen = mock.Mock(side_effect=Parsed)
        monkeypatch.setattr(module, "Run", seen)
        with mock.patch.object(sys, "argv", stages.command("x", recipe[stage.name])), pytest.raises(Parsed):
            module.main()
        parsed, = seen.call_args.args
        assert parsed.save_weight == stage.name
        if preset != "demo":
            assert (parsed.seed, parsed.eval_first) == (3, 1)
            assert parsed.use_moe is (True if stage.name.endswith("pretrain") else None)


def test_published_files_come_first_and_what_is_held_out_is_not_trained_on(tmp_path):
    args, sample = mock.Mock(preset="zero", data=[tmp_path]), tmp_path / "sample"
    sample.mkdir()
    for name, rows in {"sft.jsonl": 30, "sft_val.jsonl": 4, "sft_toolcall.jsonl": 20, "pretrain_t2t_mini.jsonl": 100,
                       "pretrain.jsonl": 9, "sample/sft.jsonl": 7, "sample/sft_val.jsonl": 3}.items():
        (tmp_path / name).write_text("".join(f"{name} {number}\n" for number in range(rows)))
    assert full_run.sources("rlaif", args, sample) == [sample / "rlaif.jsonl"]
    assert full_run.sources("pretrain", args, sample) == [tmp_path / "pretrain_t2t_mini.jsonl"]
    files = full_run.sources("sft", args, sample)
    assert files == [tmp_path / "sft.jsonl", tmp_path / "sft_toolcall.jsonl", sample / "sft.jsonl"]
    assert full_run.gather(files, tmp_path / "joined.jsonl") == 57
    assert len((tmp_path / "joined.jsonl").read_text().splitlines()) == 56
    assert len((tmp_path / "joined_val.jsonl").read_text().splitlines()) == 4 + 1 + 3  # 1 of 20: it has no {name}_val
    val = tmp_path / "sft_val.jsonl"
    val.write_bytes(val.read_bytes().rstrip())  # the last row ends the file
    full_run.gather(files, tmp_path / "joined.jsonl")
    assert len((tmp_path / "joined_val.jsonl").read_text().splitlines()) == 4 + 1 + 3
    full_run.gather([tmp_path / "pretrain_t2t_mini.jsonl"], tmp_path / "alone.jsonl")
    train, val = ((tmp_path / f"alone{end}.jsonl").read_text().splitlines() for end in ("", "_val"))
    assert len(val) == 5 and len(train) == 95 and not set(train) & set(val)
    with pytest.raises(UserError, match="download_data.py pretrain_t2t.jsonl"):
        full_run.sources("pretrain", mock.Mock(preset="full", data=[tmp_path]), sample)


@pytest.mark.parametrize("flags", [["--set", "pretrain"], ["--set", "nobody.seed=1"], ["--stages", "nothing"],
                                   ["--price-per-hour=-1"], ["--stages", "data", "dpo"],
                                   ["--set", "grpo.reward_weight=reward", "--stages", "data", "pretrain", "full_sft",
                                    "grpo"]])
def test_bad_input_is_told_in_one_line(tmp_path, capsys, flags):
    with pytest.raises(SystemExit) as ended:
        run_main(lambda: start(tmp_path, *flags))
    said = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2 and len(said) == 1 and said[0].startswith("error: "), said


# -- before running ----------------------------------------------------------------------------------------------------


def test_shapes_are_counted_without_allocating_and_the_state_is_that_of_the_formulas(capsys):
    assert sum(p.numel() for p in dry_run.meta_model(hidden_size=64, num_hidden_layers=2).parameters()) == \
        sum(p.numel() for p in small_model(hidden_size=64, num_hidden_layers=2).parameters())
    P, gb = 1.0592e9, {"ddp": 16.9, "zero1": 10.1, "zero2": 6.4, "zero3": 2.6, "fsdp": 2.1}  # docs/scaling.md
    assert {name: round(sum(state(P, 8)) / 1e9, 1) for name, state in dry_run.STATE.items()} == gb
    sizes = {"hidden_size": 2048, "num_hidden_layers": 20, "num_attention_heads": 16, "num_key_value_heads": 8}
    with mock.patch.object(sys, "argv", ["dry_run.py", *(f"--{name}={size}" for name, size in sizes.items())]):
        dry_run.main()
    assert "1,059.2 M parameters" in capsys.readouterr().out
