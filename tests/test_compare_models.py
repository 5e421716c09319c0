"""Models side by side: weights, and endpoints asked with the real openai SDK; and a judge that may misbehave."""

import json
import sys
from unittest import mock

import openai
import pytest
import torch
from lab import TOKENIZER, JsonHandler, serving, small_model

from model.cli import run_main
from model.inference.engine import SamplingParams, generate
from model.transformers_io import save_folder
from model.weights import save_weight
from scripts import compare_models


class Endpoint(JsonHandler):
    """Says the last message backwards (`two`: with a !), or, as `judge`, what `grades` hold; keeps what it heard."""

    heard: list[dict] = []
    grades: list = []

    def do_POST(self):
        request = self.body()
        self.heard.append(request)
        said = request["messages"][-1]["content"][::-1] + "!" * (request["model"] == "two")
        if request["model"] == "judge":
            said = self.grades.pop(0) if self.grades else "7"
        if isinstance(said, int):
            return self.reply(said, {"error": {"message": "out of order"}})
        self.complete(said)


@pytest.fixture
def endpoint():
    kind = type("Endpoint", (Endpoint,), {"heard": [], "grades": []})
    with serving(kind) as kind.url, mock.patch.object(openai._base_client, "INITIAL_RETRY_DELAY", 0.0):
        yield kind


@pytest.fixture
def compare(tmp_path):
    """Run the program in a folder with prompts; → the table it wrote, in cells."""
    (tmp_path / "prompts.txt").write_text("Who are you?\n\n1|2 <b>\n", "utf-8")

    def run(*models: str, **flags) -> list[list[str]]:
        flags = {"prompts": tmp_path / "prompts.txt", "out": tmp_path / "all.md", "save_dir": tmp_path / "out",
                 "device": "cpu", "max_new_tokens": 12, **flags}
        arguments = [f"--{name}={value}" for name, value in flags.items() if value is not None]
        with mock.patch.object(sys, "argv", ["", *arguments, "--models", *models]), \
                mock.patch.object(compare_models, "CONCURRENCY", 1):
            run_main(compare_models.main)
        return table(tmp_path / "all.md")
    return run


def table(path) -> list[list[str]]:
    return [line.removeprefix("| ").removesuffix(" |").split(" | ") for line in path.read_text("utf-8").splitlines()]


def fails(capsys, status: int, words: list[str], run, *models, **flags) -> None:
    with pytest.raises(SystemExit) as ended:
        run(*models, **flags)
    said = capsys.readouterr().err.splitlines()
    assert ended.value.code == status and len(said) == 1 and said[0].startswith("error: "), said
    assert all(word in said[0] for word in words), said[0]


def test_weights_folders_and_endpoints_stand_side_by_side(compare, endpoint, tmp_path):
    torch.manual_seed(4)
    model = small_model(initializer_range=0.3).eval()
    path = save_weight(model, "full_sft", tmp_path / "out", TOKENIZER)
    model.load_state_dict(torch.load(path, weights_only=True))
    save_folder(model, tmp_path / "folder", TOKENIZER)
    models = ["full_sft", "full_sft_64", str(tmp_path / "folder"), f"{endpoint.url}#first", f"{endpoint.url}#other"]
    head, _, first, second = compare(*models)
    assert head[0] == "prompt" and [name.replace("\\", "") for name in head[1:]] == models
    assert first[0] == "Who are you?" and first[4] == first[5] == "?uoy era ohW"
    assert second[0] == "1\\|2 &lt;b>" and second[4] == ">b&lt; 2\\|1"
    prompt = TOKENIZER.prompt([{"role": "user", "content": "Who are you?"}])
    greedy, = generate(model, [prompt], SamplingParams(12, temperature=0.0), TOKENIZER)
    assert first[1] == first[2] == first[3] == compare_models.cell(greedy.text) > " "
    assert [request["model"] for request in endpoint.heard] == ["first", "first", "other", "other"]
    assert all(request["max_tokens"] == 12 and request["temperature"] == 0 for request in endpoint.heard)


def test_rows_are_prompts_and_answers_may_hold_anything(compare, endpoint, tmp_path):
    rows = [{"conversations": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"},
                               {"role": "user", "content": "x\n|y"}, {"role": "assistant", "content": "gone"}]}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    *_, row = compare(f"{endpoint.url}#m", prompts=tmp_path / "rows.jsonl")
    assert row == ["x<br>\\|y", "y\\|<br>x"]
    assert [message["content"] for message in endpoint.heard[0]["messages"]] == ["a", "b", "x\n|y"]


def test_a_judge_grades_every_answer_and_sees_no_name(compare, endpoint):
    endpoint.grades += ["<think>\n3 or 4?\n</think>\n8", "Well.", "10/10", 500, "**2**", "4"]
    one, two, judge = (f"{endpoint.url}#{name}" for name in ("one", "two", "judge"))
    _, _, first, second, means = compare(one, two, judge_url=judge)
    assert [cell.split()[0] for cell in first[1:]] == ["**8**", "**2**"]
    assert [cell.split()[0] for cell in second[1:]] == ["**10**", "**4**"]
    assert means == ["**mean grade**", "**9.00**", "**3.00**"]
    asked = [request["messages"][-1]["content"] for request in endpoint.heard if request["model"] == "judge"]
    assert len(asked) == 6 and all("Who are you?" in text and "?uoy era ohW" in text for text in (asked[0], asked[4]))
    assert not any(name in text for text in asked for name in (one, two, '"one"', '"two"'))


@pytest.mark.parametrize("grades, words", [
    (["no", "11", "0 of 10"], ["'0 of 10'", "not a number from 0 to 10", "without grades"]),
    ([401], ["out of order", "without grades"])])
def test_a_judge_that_fails_is_told_and_the_answers_are_kept(compare, endpoint, capsys, tmp_path, grades, words):
    endpoint.grades += grades
    fails(capsys, 1, ["--judge_url", *words], compare, f"{endpoint.url}#m", judge_url=f"{endpoint.url}#judge")
    assert [row[1] for row in table(tmp_path / "all.md")[2:]] == ["?uoy era ohW", ">b&lt; 2\\|1"]


def test_what_cannot_be_compared_is_told_in_one_line(compare, endpoint, capsys, tmp_path):
    fails(capsys, 2, ["nothing_*.pth"], compare, "nothing")
    fails(capsys, 2, ["none.txt"], compare, f"{endpoint.url}#m", prompts=tmp_path / "none.txt")
    fails(capsys, 2, [f"{endpoint.url}#NAME"], compare, f"{endpoint.url}#m", endpoint.url)
    fails(capsys, 2, [f"{endpoint.url}#NAME"], compare, f"{endpoint.url}#m", judge_url=endpoint.url)
    fails(capsys, 2, ["--judge_url http://x:80a"], compare, f"{endpoint.url}#m", judge_url="http://x:80a#m")
    assert not endpoint.heard  # before the first model has answered
    fails(capsys, 2, ["no server at http://127.0.0.1:9/v1"], compare, "http://127.0.0.1:9/v1#m")
    (tmp_path / "bad.jsonl").write_text('{"conversations": []}\n')
    fails(capsys, 2, ["bad.jsonl:1:"], compare, f"{endpoint.url}#m", prompts=tmp_path / "bad.jsonl")
    assert not (tmp_path / "all.md").exists()


def test_without_a_file_the_table_is_printed_and_has_built_in_prompts(compare, endpoint, tmp_path, capsys):
    with pytest.raises(FileNotFoundError):
        compare(f"{endpoint.url}#m", prompts=None, out=None)
    assert "| Who are you? | ?uoy era ohW |" in capsys.readouterr().out
