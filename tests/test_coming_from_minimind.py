"""docs/coming-from-minimind.md names flags and defaults that our programs really have."""

import argparse
import ast
import re
import runpy
import subprocess
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from lab import TOKENIZER

from dataset.lm_dataset import SFTDataset
from model.chat import END_THINK, THINK
from trainer import train_full_sft
from trainer.rl.tools import SCHEMAS, call_tool

ROOT = Path(__file__).resolve().parents[1]
PAGES = ("coming-from-minimind.md", "coming-from-minimind.zh.md")
PROGRAM = r"((?:(?:trainer|scripts)/)?\w+\.py)"


class ParserFound(Exception):
    pass


def parse(program: str, *flags: str) -> argparse.Namespace:
    """What a program's parser makes of a command line."""
    parser = parser_of(ROOT / program)
    return parser.parse_args(flags)


def parser_of(program: Path) -> argparse.ArgumentParser:
    """The parser that a program gives its command line to."""
    def stop(parser: argparse.ArgumentParser, *_) -> None:
        raise ParserFound(parser)

    with (mock.patch.object(argparse.ArgumentParser, "parse_args", stop), pytest.raises(ParserFound) as found,
          mock.patch.object(sys, "argv", [str(program)]), mock.patch.object(sys, "path", ["", *sys.path])):
        runpy.run_path(str(program), run_name="__main__")
    return found.value.args[0]


def find_program(name: str) -> Path:
    return next(path for path in (ROOT / name, ROOT / "trainer" / name, ROOT / "scripts" / name) if path.is_file())


def table_rows(page: str, columns: int) -> list[list[str]]:
    lines = (ROOT / "docs" / page).read_text("utf-8").splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines if line.startswith("| ")]
    return [row for row in rows if len(row) == columns]


def same(text: str, value: object) -> bool:
    try:
        return float(text) == float(value)
    except (TypeError, ValueError):
        return text in (value, *value) if isinstance(value, list) else text == value


@pytest.mark.parametrize("page", PAGES)
def test_defaults_are_those_of_an_empty_command_line(page):
    rows = [row for row in table_rows(page, 5) if row[0].startswith("`")]
    assert len(rows) > 6
    for script, flag, published, here, _ in rows:
        parser = parser_of(find_program(script.strip("`")))
        action = parser._option_string_actions[flag.strip("`")]
        default = parser.get_default(action.dest)
        assert same(here, default), f"{page}: {script} {flag} is {default} now, not {here}; published: {published}"


@pytest.mark.parametrize("stage", [path for path in sorted((ROOT / "trainer").glob("train_*.py"))
                                   if path.stem != "train_tokenizer"], ids=lambda path: path.stem)
def test_a_stage_gets_the_defaults_that_it_names(stage):
    call = next(node for node in ast.walk(ast.parse(stage.read_text("utf-8"))) if isinstance(node, ast.Call)
                and getattr(node.func, "id", "").endswith("_parser"))
    parser = parser_of(stage)
    named = {part.arg: ast.literal_eval(part.value) for part in call.keywords if part.arg != "data_path"}
    assert len(named) > 5 and {name: parser.get_default(name) for name in named} == named


@pytest.mark.parametrize("page", PAGES)
def test_every_command_of_ours_is_accepted(page):
    commands = [match for row in (*table_rows(page, 2), *table_rows(page, 3))
                for match in re.finditer(rf"`(?:python )?{PROGRAM}((?: [^`]+)?)`", row[-1])]
    assert len(commands) > 30
    for match in commands:
        known = parser_of(find_program(match[1]))._option_string_actions
        assert set(re.findall(r"--\w+", match[2])) <= {*known}, f"{page}: {match[0]}"


@pytest.mark.parametrize("page", ["README.md", "README_zh.md", *(f"docs/{name}{end}.md" for end in ("", ".zh")
                                                                 for name in ("training", "serving"))])
def test_every_command_of_the_documentation_is_accepted(page):
    text = (ROOT / page).read_text("utf-8").replace("\\\n", " ")
    matches = [*re.finditer(rf"^\S*(?:python|torchrun --\S+ \d+) {PROGRAM}([^#\n]*)", text, re.M),
               *re.finditer(rf"`python {PROGRAM}((?: [^`]+)?)`", text)]
    assert len(matches) > 5
    for match in matches:
        if match[1] == "llmexport.py":  # of MNN
            continue
        known = parser_of(find_program(match[1]))._option_string_actions
        assert set(re.findall(r"--\w+", match[2])) <= {*known}, f"{page}: {match[0]}"


RL_FLAGS = "--num_workers 8 --debug_interval 5 --sglang_base_url http://a --sglang_model_path DIR"
RL_FLAGS += " --rollout_engine torch --sglang_shared_path DIR2 --wandb_run_name N --out_dir O --reasoning 1"
RL_ARGS = {"show_interval": 5, "rollout_url": "http://a", "tokenizer": "DIR", "rollout_engine": "local",
           "rollout_dir": "DIR2", "wandb_run_name": "N", "save_dir": "O", "thinking_ratio": 1}


@pytest.mark.parametrize(("program", "flags", "expected"), [
    ("trainer/train_pretrain.py", "--ddp --out_dir O", {"save_dir": "O"}),
    ("trainer/train_grpo.py", f"{RL_FLAGS} --debug_mode", {**RL_ARGS, "show_samples": 2}),
    ("trainer/train_agent.py", RL_FLAGS, {**RL_ARGS, "show_samples": 0}),
    ("trainer/train_ppo.py", f"{RL_FLAGS} --debug_log_ratio --ppo_update_iters 3 --early_stop_kl 0.5",
     {**RL_ARGS, "update_epochs": 3, "target_kl": 0.5}),
    ("trainer/train_distillation.py", "--student_hidden_size 512 --student_use_moe 1 --from_student_weight none",
     {"hidden_size": 512, "use_moe": 1, "from_weight": "none", "teacher_use_moe": 1}),
    ("eval_llm.py", "--historys 4 --show_speed 0 --lora_weight None --inference_rope_scaling True",
     {"history": 4, "show_speed": 0, "lora_weight": None, "inference_rope_scaling": True}),
    ("eval_llm.py", "--model_mode 3 --lora_name medical --max_seq_len 99 --inference_rope_scaling --out_dir O",
     {"weight": "reason", "lora_weight": "medical", "max_new_tokens": 99, "inference_rope_scaling": True,
      "save_dir": Path("O")}),
    ("scripts/eval_toolcall.py", "--api_model M --stream 1 --show_speed 1", {"model": "M", "show_speed": 1}),
    ("scripts/serve_openai_api.py", "--max_seq_len 8192 --lora_weight None --inference_rope_scaling False",
     {"lora_weight": None, "inference_rope_scaling": False})])
def test_published_flags_are_accepted_with_their_meaning(program, flags, expected, capsys):
    args = parse(program, *flags.split())
    assert {name: getattr(args, name) for name in expected} == expected
    assert capsys.readouterr() == ("", "")
    text = parser_of(ROOT / program).format_help()
    assert not re.search("--(sglang|ppo_update|early_stop_kl|debug|historys|api_model|out_dir|student)", text)


@pytest.mark.parametrize(("folder", "program"), [("scripts", "eval_toolcall.py"), ("trainer", "train_tokenizer.py")])
def test_programs_run_where_minimind_has_them(folder, program):
    result = subprocess.run([sys.executable, program, "--help"], cwd=ROOT / folder, capture_output=True, text=True)
    assert result.returncode == 0 and result.stdout.startswith("usage:") and not result.stderr


@pytest.mark.parametrize("page", PAGES)
def test_the_reasoning_recipe_learns_tags_from_published_rows(page, lab, tmp_path):
    text = (ROOT / "docs" / page).read_text("utf-8")
    row, command = re.search(r"```json\n(.+)\n```\n\n```sh\npython (.+?)\npython", text, re.S).groups()
    path, lab = tmp_path / "r1_mix_1024.jsonl", lab().with_base("dpo")
    path.write_text(f"{row}\n" * 4)
    flags = dict(re.findall(r"--(\w+) (\S+)", command))
    assert command.startswith("trainer/train_full_sft.py ") and flags["data_path"] == "dataset/r1_mix_1024.jsonl"
    lab.train(train_full_sft, **flags | {"data_path": path})
    assert lab.card("reason_64")["parent"] == "dpo" and lab.card("reason_64")["flags"]["tag_loss_weight"] == 10
    targets = SFTDataset(path, TOKENIZER, 64, cache_dir=tmp_path, empty_think_ratio=0).batch(np.arange(1))["targets"]
    assert [int((targets == tag).sum()) for tag in (THINK, END_THINK)] == [1, 1]
    assert "<answer>\n3\n</answer>" in TOKENIZER.decode(targets.tolist())


@pytest.mark.parametrize("page", PAGES)
def test_tools_return_the_shapes_that_the_table_shows(page):
    rows = {row[0].strip("`"): ast.literal_eval(row[2].strip("`")) for row in table_rows(page, 3)
            if row[0].strip("`") in SCHEMAS}
    calls = {"calculate_math": {"expression": "256 * 37"}, "text_length": {"text": "red apple"},
             "unit_converter": {"value": 100, "from_unit": "km", "to_unit": "miles"}, "get_current_time": {},
             "get_current_weather": {"location": "北京"}, "random_number": {"min": 7, "max": 7},
             "get_exchange_rate": {"from_currency": "USD", "to_currency": "CNY"},
             "translate_text": {"text": "Happy birthday", "target_language": "chinese"}}
    results = {name: call_tool(name, arguments, seed=1) for name, arguments in calls.items()}
    assert rows.keys() == SCHEMAS.keys()
    assert {name: [*row] for name, row in rows.items()} == {name: [*result] for name, result in results.items()}
    computed = ("calculate_math", "text_length", "unit_converter", "random_number", "translate_text")
    assert [rows[name] for name in computed] == [results[name] for name in computed]


def test_both_languages_list_the_same():
    english, chinese = ([[re.findall(r"`[^`]+`", cell) for cell in row] for columns in (2, 3, 5)
                         for row in table_rows(page, columns)] for page in PAGES)
    assert english == chinese
