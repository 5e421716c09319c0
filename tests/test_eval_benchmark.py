"""Likelihoods, texts and benchmarks: against transformers, token by token, and against lm-eval with its own prompts."""

import csv
import gzip
import json
import math
import random
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
from lab import TOKENIZER, small_model
from transformers import AutoModelForCausalLM

from model import loading
from model.chat import BOS
from model.cli import run_main
from model.inference import likelihood
from model.inference.likelihood import ScoringRequest, log_likelihoods
from model.transformers_io import save_folder
from model.weights import save_weight
from scripts import eval_benchmark
from scripts.eval_benchmark import answer, measure_context, measure_texts, percent, summarise, with_examples
from scripts.lib.benchmark_formats import FORMATS, Question, read_questions


def sharp_model(**options):
    """Random, but far from indifferent between tokens."""
    return small_model(initializer_range=0.3, **options).eval().half().float()  # as it is saved


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(1)
    return sharp_model()


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("exported")
    save_folder(model, path, TOKENIZER)
    return path


def write_json(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    return path


# -- likelihoods -------------------------------------------------------------------------------------------------------


def requests(vocabulary: int) -> list[ScoringRequest]:
    """Of many lengths; with one option, with many, and with options of one token."""
    dice = random.Random(0)

    def text(most: int) -> list[int]:
        return [dice.randrange(vocabulary) for _ in range(dice.randint(1, most))]

    return [ScoringRequest(text(40), [text(most) for _ in range(count)])
            for count, most in [(1, 30), (4, 1), (4, 9), (2, 5), (3, 1), (1, 60), (5, 12), (4, 7)]]


@pytest.mark.parametrize("use_moe", [False, True])
def test_log_likelihoods_of_shared_contexts_are_those_of_each_option_alone_in_transformers(tmp_path, use_moe):
    ours = sharp_model(use_moe=use_moe, norm_topk_prob=True)
    save_folder(ours, tmp_path, TOKENIZER)
    theirs, wanted = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32), requests(6400)
    expected = []
    for context, options in wanted:
        for option in options:
            logits = theirs(torch.tensor([context + option])).logits[0, len(context) - 1:-1]
            expected.append(logits.log_softmax(-1).gather(1, torch.tensor(option)[:, None]).sum().item())
    with mock.patch.object(likelihood, "HEAD_ROWS", 7):
        for model, batch_tokens in ((ours, 200), (ours, 1), (theirs, 200)):
            found = [score for scores in log_likelihoods(model, wanted, batch_tokens) for score in scores]
            assert found == pytest.approx(expected, abs=1e-3)


# -- against lm-eval ---------------------------------------------------------------------------------------------------


def sentence(dice: random.Random, most: int = 12) -> str:
    words = ["the", "cat", "sees", "a", "red", "house", "and", "runs", "small", "hills", "你好", "天空", "因为", "3.5"]
    return " ".join(dice.choices(words, k=dice.randint(2, most)))


def hub_rows(count: int = 10) -> dict[str, list[dict]]:
    """Questions of every benchmark in the layout of the hub, which lm-eval reads."""
    dice = random.Random(0)

    def listed(stem: str) -> dict:
        labels = dice.choice(["ABCD", "1234"])
        return {stem: sentence(dice), "choices": {"text": [sentence(dice) for _ in labels], "label": list(labels)},
                "answerKey": dice.choice(labels)}

    def letters(question: str, key: str) -> dict:
        return {question: f" {sentence(dice)} ", **{letter: sentence(dice) for letter in "ABCD"},
                key: dice.choice("ABCD")}

    return {
        "arc": [listed("question") for _ in range(count)],
        "openbookqa": [listed("question_stem") for _ in range(count)],
        "piqa": [{"goal": sentence(dice), "sol1": sentence(dice), "sol2": sentence(dice), "label": dice.randrange(2)}
                 for _ in range(count)],
        "siqa": [{"context": sentence(dice), "question": sentence(dice),
                  **{f"answer{letter}": sentence(dice) for letter in "ABC"}, "label": str(dice.randint(1, 3))}
                 for _ in range(count)],
        "hellaswag": [{"activity_label": sentence(dice, 4), "ctx_a": f"[header] {sentence(dice)} [title] Then",
                       "ctx_b": sentence(dice, 5), "label": str(dice.randrange(4)),
                       "endings": [f"{sentence(dice)} [substeps]  {sentence(dice)}" for _ in range(4)]}
                      for _ in range(count)],
        "ceval": [letters("question", "answer") for _ in range(count)],
        "cmmlu": [letters("Question", "Answer") for _ in range(count)],
    }


THEIR_FILES = {"arc": "arc/arc_easy.yaml", "openbookqa": "openbookqa/openbookqa.yaml", "piqa": "piqa/piqa.yaml",
               "siqa": "siqa/siqa.yaml", "hellaswag": "hellaswag/hellaswag.yaml", "ceval": "ceval/_default_ceval_yaml",
               "cmmlu": "cmmlu/_default_template_yaml"}


@pytest.fixture(scope="module")
def lm_eval(folder, tmp_path_factory):
    """lm-eval's results on the exported folder, with its own task files on our rows; and where the rows lie."""
    lm_eval = pytest.importorskip("lm_eval")
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    place, theirs = tmp_path_factory.mktemp("tasks"), Path(lm_eval.__file__).parent / "tasks"
    shots = write_json(place / "shots.jsonl", hub_rows(13)["cmmlu"][-3:])
    texts = write_json(place / "texts.jsonl", [{"text": sentence(random.Random(i), 90)} for i in range(6)])
    tasks = {name: ["include: " + json.dumps(str(theirs / file)), f"num_fewshot: {2 if name == 'cmmlu' else 0}"]
             for name, file in THEIR_FILES.items()}
    tasks["texts"] = ["output_type: loglikelihood_rolling", 'doc_to_text: ""', 'doc_to_target: "{{text}}"',
                      "metric_list: [{metric: bits_per_byte}]"]
    for name, lines in tasks.items():
        rows = texts if name == "texts" else write_json(place / f"{name}.jsonl", hub_rows()[name])
        dev = {"dev": str(shots)} if name == "cmmlu" else {}
        kwargs = {"data_files": {"test": str(rows), **dev}, "cache_dir": str(place / "cache")}
        (place / f"{name}.yaml").write_text("\n".join([
            *lines, f"task: local_{name}", "dataset_path: json", "dataset_name: null", "test_split: test",
            "validation_split: null", "training_split: null", f"fewshot_split: {'dev' if dev else 'null'}",
            "dataset_kwargs: " + json.dumps(kwargs)]), "utf-8")
    model = HFLM(pretrained=str(folder), device="cpu", dtype="float32", batch_size=4)
    manager = TaskManager(include_path=str(place), include_defaults=False)
    names = [f"local_{name}" for name in THEIR_FILES]
    results = lm_eval.simple_evaluate(model=model, tasks=names, task_manager=manager)
    model._max_length = 32
    texts = lm_eval.simple_evaluate(model=model, tasks=["local_texts"], task_manager=manager, bootstrap_iters=0)
    return place, results, texts


@pytest.mark.parametrize("name", FORMATS)
def test_benchmarks_score_as_in_lm_eval(lm_eval, model, name):
    place, theirs, _ = lm_eval
    questions = read_questions(name, place / f"{name}.jsonl")
    if name == "cmmlu":
        examples = read_questions(name, place / "shots.jsonl")
        questions = with_examples([question._replace(subject="") for question in questions],
                                  [example._replace(subject="") for example in examples], 2)
    ours = answer(model, TOKENIZER, questions)
    samples = sorted(theirs["samples"][f"local_{name}"], key=lambda sample: sample["doc_id"])
    for mine, sample in zip(ours, samples, strict=True):
        assert mine["log_p"] == pytest.approx([score for score, _ in sample["filtered_resps"]], abs=1e-3)
        assert mine["acc"] == sample["acc"] and mine["acc_norm"] == sample.get("acc_norm", mine["acc_norm"])
    summary, total = summarise(ours), theirs["results"][f"local_{name}"]
    for kind in ("acc", "acc_norm"):
        if f"{kind},none" in total:
            assert summary[kind] == total[f"{kind},none"]
            assert summary[f"{kind}_stderr"] == pytest.approx(total[f"{kind}_stderr,none"])


def test_bits_a_byte_are_those_of_lm_eval(lm_eval, model):
    place, _, theirs = lm_eval
    ours = measure_texts(model, TOKENIZER, eval_benchmark.read_texts(place / "texts.jsonl"), 32)
    assert ours["tokens"] > 6 * 32
    assert ours["bits_per_byte"] == pytest.approx(theirs["results"]["local_texts"]["bits_per_byte,none"], rel=1e-5)


# -- files -------------------------------------------------------------------------------------------------------------


def test_a_standard_error_of_zero_is_shown():
    assert percent(0.0) == "0.0%" and percent(None) == "nan%"


def as_published(name: str, rows: list[dict], place: Path) -> Path:
    """The rows of the hub, as the benchmark's authors laid them out."""
    if name in ("ceval", "cmmlu"):
        path = place / "anatomy_val.csv"
        texts = [list(row.values()) for row in rows]
        with open(path, "w", encoding="utf-8-sig", newline="") as file:
            csv.writer(file).writerows([["id", *rows[0]], *([str(i), *text] for i, text in enumerate(texts))])
        return path
    path = place / "valid.jsonl"
    if name in ("piqa", "siqa"):
        (place / "valid-labels.lst").write_text("".join(f"{row['label']}\n" for row in rows))
        rows = [{key: value for key, value in row.items() if key != "label"} for row in rows]
    if name in ("arc", "openbookqa"):
        rows = [{"id": "7", "answerKey": row["answerKey"], "question": {
            "stem": row["question" if name == "arc" else "question_stem"],
            "choices": [{"text": text, "label": label} for text, label in
                        zip(*(row["choices"][part] for part in ("text", "label")), strict=True)]}} for row in rows]
    write_json(path, rows)
    if name == "piqa":  # the labels of a packed file are beside it, too
        path.with_name("valid.jsonl.gz").write_bytes(gzip.compress(path.read_bytes()))
        path = path.with_name("valid.jsonl.gz")
    return path


@pytest.mark.parametrize("name", FORMATS)
def test_a_published_file_holds_the_questions_of_the_hub(tmp_path, name):
    rows = hub_rows()[name]
    hub, published = (read_questions(name, path) for path in (write_json(tmp_path / "hub.jsonl", rows),
                                                              as_published(name, rows, tmp_path)))
    assert [question._replace(subject="") for question in published] == [q._replace(subject="") for q in hub]
    assert {question.gold for question in hub} > {0}
    assert published[0].subject == ("anatomy" if name in ("ceval", "cmmlu") else "")


@pytest.mark.parametrize("name", ["arc", "openbookqa", "piqa", "hellaswag"])
def test_rows_of_query_choices_and_gold_are_read(tmp_path, name):
    hub = read_questions(name, write_json(tmp_path / "hub.jsonl", hub_rows()[name]))
    rows = [{"query": question.context.removesuffix("\nAnswer:"), "choices": question.options, "gold": question.gold}
            for question in hub]
    assert read_questions(name, write_json(tmp_path / "rows.jsonl", rows)) == hub


def test_a_folder_is_all_its_files_and_a_subject_may_stand_in_the_row(tmp_path):
    rows = hub_rows()["cmmlu"]
    as_published("cmmlu", rows[:4], tmp_path)
    with gzip.open(tmp_path / "more.jsonl.gz", "wt", encoding="utf-8") as file:
        file.write(json.dumps(rows[4] | {"subject": "law"}) + "\n")
    assert [question.subject for question in read_questions("cmmlu", tmp_path)] == ["anatomy"] * 4 + ["law"]


@pytest.mark.parametrize("name, change, words", [
    ("ceval", {"answer": ""}, ["rows.jsonl:2:", "ceval"]), ("hellaswag", {"label": ""}, ["rows.jsonl:2:"]),
    ("piqa", {"sol2": ""}, ["rows.jsonl:2:", "empty"]), ("piqa", {"label": 2}, ["rows.jsonl:2:", "2 is not"]),
    ("siqa", {"label": "0"}, ["rows.jsonl:2:"]), ("arc", {"choices": None}, ["rows.jsonl:2:"]),
    ("openbookqa", {"question_stem": 3}, ["rows.jsonl:2:"]), ("arc", {"answerKey": "E"}, ["rows.jsonl:2:"]),
])
def test_a_row_without_an_answer_is_told_in_one_line(tmp_path, run, capsys, name, change, words):
    rows = hub_rows()[name]
    rows[1] |= change
    fails(run, capsys, ["--benchmark", name, write_json(tmp_path / "rows.jsonl", rows)], *words)


# -- the program -------------------------------------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path, model, monkeypatch):
    monkeypatch.setattr(loading, "inference_dtype", lambda *_: torch.float32)  # as the referees, on any CPU

    def run(*arguments) -> dict:
        save_weight(model, "full_sft", tmp_path / "out", TOKENIZER)
        with mock.patch.object(sys, "argv", ["", "--save_dir", str(tmp_path / "out"), "--device=cpu",
                                             f"--json={tmp_path / 'all.json'}", *map(str, arguments)]):
            run_main(eval_benchmark.main)
        return json.loads((tmp_path / "all.json").read_text("utf-8"))
    return run


def fails(run, capsys, arguments: list, *words: str) -> None:
    with pytest.raises(SystemExit) as ended:
        run(*arguments)
    said = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2 and len(said) == 1 and said[0].startswith("error: "), said
    assert all(word in said[0] for word in words), said[0]


def test_texts_are_measured_with_every_token_predicted_once(run, tmp_path, model):
    texts = [sentence(random.Random(i), 40) for i in range(3)]
    write_json(tmp_path / "rows.jsonl", [{"text": text} for text in texts])
    with gzip.open(tmp_path / "text.txt.gz", "wt", encoding="utf-8") as file:
        file.write(texts[0])
    measured = run("--text", tmp_path / "rows.jsonl", tmp_path / "text.txt.gz")["texts"]
    rows, whole = measured.values()
    assert rows["documents"] == 3 and rows["bytes"] == sum(len(text.encode()) for text in texts)
    ids = torch.tensor([[BOS, *TOKENIZER.encode_text(texts[0])]])
    loss = model(ids, labels=ids).loss.item()
    assert whole["perplexity"] == pytest.approx(math.exp(loss), rel=1e-4)
    bits = loss * len(ids[0, 1:]) / math.log(2)
    assert whole["bits_per_byte"] == pytest.approx(bits / len(texts[0].encode()), rel=1e-4)


def test_subjects_and_their_total_with_the_chance_of_guessing(run, tmp_path, capsys):
    rows = [row | {"subject": subject} for row, subject in zip(hub_rows()["cmmlu"], "aaaaaaabbb", strict=True)]
    path = write_json(tmp_path / "cmmlu.jsonl", rows)
    total, = run("--benchmark", "cmmlu", path)["benchmarks"].values()
    parts = total["subjects"]
    assert [parts[name]["questions"] for name in "ab"] == [7, 3] and total["random"] == 0.25
    assert total["acc"] == pytest.approx((7 * parts["a"]["acc"] + 3 * parts["b"]["acc"]) / 10)
    told = capsys.readouterr().out
    assert f"| **cmmlu** cmmlu.jsonl | 10 | {total['acc']:.1%} ± {total['acc_stderr']:.1%} |" in told
    shown, = run("--benchmark", "cmmlu", path, "--fewshot", 2, "--fewshot_path", path)["benchmarks"].values()
    assert shown["fewshot"] == 2


def test_a_longer_context_is_measured_on_the_same_tokens(run, tmp_path, model):
    text = " ".join(sentence(random.Random(i)) for i in range(300))
    (tmp_path / "long.txt").write_text(text, "utf-8")
    found = run("--long_text", tmp_path / "long.txt", "--lengths", 300, 512,
                "--picture", tmp_path / "long.png")["context"]
    assert (tmp_path / "long.png").read_bytes().startswith(b"\x89PNG")
    ids = TOKENIZER.encode_text(text)
    ends = [512 + (len(ids) - 512) * i // 15 for i in range(16)]
    for name, scaling in (("plain", False), ("yarn", True)):
        other = small_model(inference_rope_scaling=scaling)
        other.load_state_dict(model.state_dict())
        for length, perplexity in zip((300, 512), found[name], strict=True):
            window = torch.tensor([ids[end - length:end] for end in ends])
            log_p = other(window).logits[:, -257:-1].log_softmax(-1).gather(2, window[:, -256:, None])
            assert perplexity == pytest.approx(math.exp(-log_p.mean().item()), rel=1e-3)
    assert found["plain"][1] != found["yarn"][1]


def test_a_question_is_no_example_for_itself():
    questions = [Question(f"q{i}", ["a", "b"], 0) for i in range(3)]
    contexts = [question.context for question in with_examples(questions, questions, 2)]
    assert contexts == ["q1 a\n\nq2 a\n\nq0", "q0 a\n\nq2 a\n\nq1", "q0 a\n\nq1 a\n\nq2"]


def test_weights_are_measured_in_fp32_whatever_the_machine_is_fast_in(run, tmp_path, model, monkeypatch):
    monkeypatch.setattr(loading, "inference_dtype", lambda *_: torch.bfloat16)
    (tmp_path / "text.txt").write_text("the cat")
    result = {"tokens": 1, "bytes": 1, "perplexity": 1.0, "bits_per_byte": 1.0}
    with mock.patch.object(eval_benchmark, "measure_texts", return_value=result) as measured:
        run("--text", tmp_path / "text.txt")
    weight = measured.call_args.args[0].model.embed_tokens.weight
    assert torch.equal(weight, model.model.embed_tokens.weight.half().float())


def test_yarn_is_left_as_it_was(model):
    measure_context(model, [5] * 600, [300])
    assert model.config.inference_rope_scaling is False


@pytest.mark.parametrize("arguments, words", [
    ([], ["nothing to measure"]), (["--benchmark", "mmlu", "x"], ["mmlu", "cmmlu"]),
    (["--benchmark", "arc", "none.jsonl"], ["none.jsonl", "no such file"]), (["--text", "none.txt"], ["none.txt"]),
    (["--long_text", "{place}/short.txt"], ["tokens", "8,192"]), (["--text", "{place}/short.jsonl"], [":1:", "text"]),
    (["--text", "{place}/empty.txt"], ["empty.txt", "empty"]), (["--text", "{place}/latin.txt"], ["latin.txt:1:"]),
    (["--long_text", "x", "--picture", "x.jpg"], ["--picture x.jpg", ".png"]),
    (["--long_text", "x", "--lengths", "256"], ["--lengths"]), (["--fewshot", "1", "--text", "x"], ["--fewshot_path"]),
])
def test_mistakes_are_told_in_one_line(run, tmp_path, capsys, arguments, words):
    (tmp_path / "short.txt").write_text("too short")
    (tmp_path / "short.jsonl").write_text('{"conversations": []}\n')
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "latin.txt").write_bytes("für".encode("latin-1"))
    fails(run, capsys, [argument.format(place=tmp_path) for argument in arguments], *words)


def test_too_few_examples_are_told(run, tmp_path, capsys):
    path = write_json(tmp_path / "law.jsonl", hub_rows()["cmmlu"][:2])
    fails(run, capsys, ["--benchmark", "cmmlu", path, "--fewshot", 3, "--fewshot_path", path], "has 1", "'law'")
