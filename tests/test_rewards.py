"""Rewards: each rule on cases worked by hand and on the sample's answers, models against transformers, the judge."""

import json
import logging
import random
import re

import pytest
import torch
from lab import SMALL, TOKENIZER, JsonHandler, serving, small_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
)

from dataset.prompts import Prompt
from dataset.sample_world import SKILLS, World
from model.chat import EOS, PAD, parse_message
from model.cli import Failure, Parser, UserError
from model.model_minimind import MiniMindConfig
from model.model_reward import MiniMindForSequenceClassification
from model.transformers_io import qwen3_config, save_folder
from model.weights import save_weight
from trainer.rl import reward_models
from trainer.rl.reward_models import classify, grade_of
from trainer.rl.rewards import Rewards, accuracy, add_reward_args, format_ok, make_rewards, repetition
from trainer.rl.trajectory import Trajectory


def ids_of(text: str) -> list[int]:
    """Ids of a text in which markers are markers."""
    names = {TOKENIZER.token_bytes[i].decode(): i for i in range(36)}
    pieces = re.split("(" + "|".join(map(re.escape, names)) + ")", text)
    return [i for piece in pieces for i in ([names[piece]] if piece in names else TOKENIZER.encode_text(piece))]


def sample(text: str, gt: tuple = (), thinking: bool = False, finish_reason: str = "stop",
           question: str = "?") -> tuple[Prompt, Trajectory]:
    """A prompt and what a model sample, markers and all; the stop token unless it was cut off."""
    messages = [{"role": "user", "content": question}]
    prompt = Prompt(TOKENIZER.prompt(messages, open_thinking=thinking), messages, thinking, list(gt), "rows.jsonl:7")
    ids = ids_of(text) + [EOS] * (finish_reason == "stop")
    return prompt, Trajectory(prompt, ids, [True] * len(ids), [-1.0] * len(ids), finish_reason,
                              parse_message(TOKENIZER, ids, thinking))


def make(*flags: str, prompts: list | None = None, **more) -> Rewards:
    parser = Parser()
    add_reward_args(parser)
    args = parser.parse_args(flags)
    vars(args).update(hidden_size=None, use_moe=None, **more)
    return make_rewards(args, TOKENIZER, torch.device("cpu"), prompts=prompts)


@pytest.mark.parametrize(("text", "gt", "score"), [
    ("The result is 42.", ["42"], 1), ("42.0", ["42"], 1), ("4２", ["42.00"], 1), ("1,234 km", ["1234"], 1),
    ("是-5。", ["-5"], 1), ("7-5=2", ["2"], 1), ("10 - 5", ["-5"], 0), ("421", ["42"], 0), ("0.42", ["42"], 0),
    ("40, 41, 42, 43", ["42"], 0), (" ".join(map(str, range(100))), ["42"], 0), ("42 is no 43", ["42"], 0),
    ("The flag is  RED.", ["red"], 1), ("bored", ["red"], 0), ("旗帜是红色的", ["红色"], 1), ("绿色", ["红色"], 0),
    ("27 + 5 = 32.", ["27 + 5 = 32"], 1), ("27 + 5 = 31. 27 + 5 = 32. 27 + 5 = 33.", ["27 + 5 = 32"], 0),
    ("In order: 3, 5, 7.", ["3, 5, 7"], 1), ("3, 5, 7; 3, 7, 5; 5, 3, 7", ["3, 5, 7"], 0),
    ("5 and 3", ["3", "5"], 1), ("5 and 4", ["3", "5"], 0.5), ("3 4 5", ["3", "5"], 0.5), ("5", ["5", "5"], 0.5),
    ("Lumora has 42", ["lumora", "42"], 1), ("", ["42"], 0), ("42", [], 0), ("anything", [""], 0)])
def test_exact_hits_what_is_true_and_no_list_of_everything(text, gt, score):
    assert accuracy(*sample(text, gt)) == score


@pytest.mark.parametrize("text, gt, score", [("The area is 12 m².", "12", 1), ("It is 10⁵.", "105", 0),
                                             ("12 (H₂O)", "12", 1)])
def test_small_digits_are_no_digits_of_a_number(text, gt, score):
    assert accuracy(*sample(text, (gt,))) == score


def test_exact_takes_every_canonical_answer_of_the_sample():
    world = World()
    for number in range(600):
        world.rng, world.lang, world.split = random.Random(number), number % 2, ("train", "heldout")[number % 3 == 0]
        case = world.case(SKILLS[number % len(SKILLS)])
        assert accuracy(*sample(case.messages[-1]["content"], (case.value,))) == 1, case
        if case.wrong and SKILLS[number % len(SKILLS)] != "tools":  # where 42 km may be 42 m
            assert accuracy(*sample(case.wrong["content"], (case.value,))) == 0, case


CALL = '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>'


@pytest.mark.parametrize(("text", "options", "good"), [
    ("Hello.", {}, True), ("Hello.", {"finish_reason": "length"}, False), ("", {}, False), (" \n", {}, False),
    ("so\n</think>\n\nHello.", {"thinking": True}, True), ("Hello.", {"thinking": True}, False),
    ("\n</think>\n\nHello.", {"thinking": True}, False), ("so\n</think>\n\n", {"thinking": True}, False),
    ("so\n</think>\n\nHello.</think>", {"thinking": True}, False), ("</think>Hello.", {}, False),
    (CALL, {}, True), (f"Look: {CALL}\n{CALL}", {}, True), ('Hello.<tool_call>\n{"name"\n</tool_call>', {}, False),
    ('Hello.<tool_call>\n{"name": "f", "arguments": {}}', {}, False), ("Hello.</tool_call>", {}, False),
    ("Hello.<|im_start|>", {}, False), ("Hello.<|endoftext|>", {}, False), ("<tool_response>Hello.", {}, False)])
def test_format_is_all_or_nothing(text, options, good):
    assert format_ok(*sample(text, **options)) == good


def test_an_answer_that_the_padding_token_ended_is_not_well_formed():
    prompt, trajectory = sample("Hello.")
    trajectory.completion_ids[-1] = PAD
    assert format_ok(prompt, trajectory) == 0


def test_length_and_repetition_are_smooth_and_bounded():
    score = make().score
    text = ["", " a", " a" * 4, " a b c d e f g h", " a" * 512, " a" * 1024]
    columns = score(*map(list, zip(*map(sample, text), strict=True)))
    assert columns[:, 2].tolist() == pytest.approx([0, 0.25, 1, 1, 0.5, 0.25])
    assert columns[:, 3].tolist() == pytest.approx([0, 0, 0, 0, 1 / 509 - 1, 1 / 1021 - 1])
    assert repetition(*sample(" a b c d x a b c d")) == pytest.approx(-1 / 6)


def test_only_what_was_said_after_the_last_observation_counts():
    prompt, trajectory = sample("Hello.")
    observed = ids_of("<tool_response>\n1\n</tool_response>" + " x y z" * 9)
    trajectory.completion_ids = observed + trajectory.completion_ids
    trajectory.action_mask = [False] * len(observed) + trajectory.action_mask
    assert format_ok(prompt, trajectory) == 1 and repetition(prompt, trajectory) == 0


def test_the_total_is_the_weighted_sum_and_the_mix_is_checked():
    rewards = make("--reward_mix=exact=2,format=0.25,length=0")
    assert rewards.names == ["exact", "format", "length", "repetition"]
    assert rewards.weights.tolist() == [2, 0.25, 0, 1]
    prompt, trajectory = sample("The result is 42.", ["42"])
    columns = rewards.score([prompt], [trajectory])
    assert columns.dtype == torch.float32 and rewards.total(columns).tolist() == [2.25]
    for mix in ("exakt=1", "exact", "exact=x", "exact=nan", "judge=1"):
        with pytest.raises(UserError, match="components of this run are exact, format"):
            make(f"--reward_mix={mix}")


@pytest.mark.parametrize("answer", [float("nan"), float("inf"), None])
def test_a_component_that_fails_names_itself_and_the_row(answer):
    def component(prompts, _):
        return [1.0 if prompt.source != "rows.jsonl:9" else answer if answer is not None else 1 / 0
                for prompt in prompts]

    pairs = [sample("a"), sample("b"), sample("c")]
    prompts = [Prompt([1], [], source=f"rows.jsonl:{number}") for number in (8, 9, 10)]
    with pytest.raises(Failure, match=r"reward odd .*rows.jsonl:9"):
        Rewards({"odd": component}, {}).score(prompts, [trajectory for _, trajectory in pairs])


# -- models ------------------------------------------------------------------------------------------------------------

ANSWERS = ["Yes.", "No, and here is a much longer answer: one two three four.", "", "也许。", "so it goes"]


def small_reward() -> MiniMindForSequenceClassification:
    return MiniMindForSequenceClassification(MiniMindConfig(**SMALL)).eval()


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """A reward weight of ours, saved both ways, and its folder."""
    torch.manual_seed(1)
    model = small_reward()
    torch.nn.init.normal_(model.score.weight)
    out = tmp_path_factory.mktemp("out")
    model.half().float()
    save_weight(model, "reward", out, TOKENIZER)
    save_folder(model, out / "reward", TOKENIZER, "SequenceClassification", num_labels=1)
    return out


def batch(**options) -> tuple[list, list]:
    return tuple(map(list, zip(*(sample(text, question="Is it?", **options) for text in ANSWERS), strict=True)))


def test_the_folder_has_one_label_and_transformers_does_not_complain(own, monkeypatch):
    monkeypatch.setattr(logging.Logger, "warning", lambda self, text, *_: pytest.fail(text))
    config = qwen3_config(small_reward().config, num_labels=1)
    assert config.num_labels == AutoConfig.from_pretrained(own / "reward").num_labels == 1


@pytest.mark.parametrize("finish_reason", ["stop", "length"])
def test_our_reward_weight_scores_as_transformers_does_with_the_ids_as_they_are(own, finish_reason):
    prompts, trajectories = batch(finish_reason=finish_reason)
    referee = AutoModelForSequenceClassification.from_pretrained(own / "reward", dtype=torch.float32).eval()
    ids = [torch.tensor([t.tokens + [EOS] * (finish_reason == "length")]) for t in trajectories]
    with torch.no_grad():
        expected = torch.cat([referee(row).logits[:, 0] for row in ids])
    rewards = make("--reward_weight=reward", save_dir=own)
    assert rewards.names[-1] == "weight" and expected.std() > 0.1
    torch.testing.assert_close(rewards.score(prompts, trajectories)[:, -1], expected, atol=1e-5, rtol=1e-4)


def test_prompts_without_gt_are_scored_by_our_reward_weight_or_a_warning_says_what_is_learned(own, tmp_path, capsys):
    with_gt, without = sample("4", ["4"])[0], sample("4")[0]
    cases = (([without], own, [], "weight", "the weight reward"), ([with_gt, without], own, [], "repetition", ""),
             ([without], own, ["--reward_weight=none"], "repetition", ""),
             ([with_gt], own, ["--reward_weight=none"], "repetition", ""),
             ([without], tmp_path, [], "repetition", "only format, length, repetition are learned"))
    for prompts, save_dir, flags, last, words in cases:
        assert make(*flags, prompts=prompts, save_dir=save_dir).names[-1] == last
        err = capsys.readouterr().err
        assert words in err and err.count("\n") == bool(words)
    assert "--reward_model_path DIR" in err and "--judge_url" in err and "train_reward.py" in err


def test_a_sequence_classifier_reads_its_own_template_and_padding_changes_nothing(own, monkeypatch):
    monkeypatch.setattr(reward_models, "inference_dtype", lambda *_: torch.float32)  # as the referee, on any CPU
    prompts, trajectories = batch()
    rewards = make(f"--reward_model_path={own / 'reward'}")
    referee = AutoModelForSequenceClassification.from_pretrained(own / "reward", dtype=torch.float32).eval()
    theirs = AutoTokenizer.from_pretrained(own / "reward")
    chats = [[{"role": "user", "content": "Is it?"}, {"role": "assistant", "content": text}] for text in ANSWERS]
    with torch.no_grad():
        expected = torch.cat([referee(torch.tensor([theirs.apply_chat_template(chat, return_dict=False)])).logits[:, 0]
                              for chat in chats])
    torch.testing.assert_close(rewards.score(prompts, trajectories)[:, -1], expected, atol=1e-5, rtol=1e-4)


def test_rows_that_hold_the_padding_token_are_padded_with_another():
    torch.manual_seed(0)
    model = LlamaForSequenceClassification(LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, num_labels=1,
        pad_token_id=None)).eval()
    rows = [[5, 6, 2], [5, 6, 7, 8, 9, 10, 2], [0, 1], [2]]
    with torch.no_grad():
        alone = torch.tensor([float(model(torch.tensor([row])).logits) for row in rows])
        for pad in (None, 2, 0, 30):
            torch.testing.assert_close(classify(model, rows, pad, batch_size=3), alone, atol=1e-6, rtol=1e-5)
    assert model.config.pad_token_id is None


def test_an_encoder_does_not_look_at_padding():
    model = BertForSequenceClassification(BertConfig(
        vocab_size=40, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, num_labels=1,
        initializer_range=0.5)).eval()
    rows = [[5, 6, 2], [5, 6, 7, 8, 9, 10, 2]]
    with torch.no_grad():
        alone = torch.cat([model(torch.tensor([row])).logits[:, 0] for row in rows])
        torch.testing.assert_close(classify(model, rows, 0), alone, atol=1e-5, rtol=1e-5)


MODELING = '''
import torch
from transformers import PretrainedConfig, PreTrainedModel

class OddConfig(PretrainedConfig):
    model_type = "odd"

class OddModel(PreTrainedModel):
    config_class = OddConfig
    def __init__(self, config):
        super().__init__(config)
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.post_init()
    def get_score(self, tokenizer, conversation):
        return float(len(conversation[-1]["content"]))
'''


def test_a_model_with_code_of_its_own_needs_leave_and_gives_its_score(tmp_path):
    folder = tmp_path / "odd"
    folder.mkdir()
    (folder / "odd.py").write_text(MODELING)
    (folder / "config.json").write_text(json.dumps({
        "model_type": "odd", "architectures": ["OddModel"],
        "auto_map": {"AutoConfig": "odd.OddConfig", "AutoModel": "odd.OddModel"}}))
    save_file({"weight": torch.zeros(1)}, folder / "model.safetensors", {"format": "pt"})
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((TOKENIZER.folder / name).read_bytes())
    with pytest.raises(UserError, match="--trust_remote_code 1"):
        make(f"--reward_model_path={folder}")
    rewards = make(f"--reward_model_path={folder}", "--trust_remote_code=1")
    assert rewards.score(*batch())[:, -1].tolist() == [len(text) for text in ANSWERS]


def test_what_is_no_reward_model_is_refused(tmp_path):
    save_folder(small_model(), tmp_path / "talks", TOKENIZER)
    save_folder(small_reward(), tmp_path / "two", TOKENIZER, "SequenceClassification", num_labels=1)
    config = json.loads((tmp_path / "two" / "config.json").read_text())
    config["id2label"] = {"0": "bad", "1": "good"}
    (tmp_path / "two" / "config.json").write_text(json.dumps(config))
    weights = load_file(tmp_path / "two" / "model.safetensors")
    save_file(weights | {"score.weight": torch.zeros(2, 64)}, tmp_path / "two" / "model.safetensors", {"format": "pt"})
    for path in (tmp_path / "talks", tmp_path / "nothing", tmp_path / "two"):
        with pytest.raises(UserError, match=f"--reward_model_path {path}"):
            make(f"--reward_model_path={path}")


# -- the judge ---------------------------------------------------------------------------------------------------------

@pytest.fixture
def judge():
    """An endpoint that grades by `grades` in turn: text is a reply, a number is a status."""
    class Handler(JsonHandler):
        requests, grades = [], []

        def do_POST(self):
            self.requests.append((self.headers["Authorization"], self.body()))
            grade = self.grades.pop(0) if len(self.grades) > 1 else self.grades[0]
            if isinstance(grade, int):
                return self.reply(grade, {"error": {"message": "busy"}}, **{"retry-after-ms": "1"})
            self.complete(grade)

    with serving(Handler) as Handler.url:
        yield Handler


def test_the_judge_is_asked_once_about_each_answer_and_again_when_it_is_busy(judge, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    judge.grades = [503, 429, "I would say so.", "Grade: 8/10"]
    rewards = make(f"--judge_url={judge.url}", "--judge_model=strict")
    prompt, trajectory = sample("Four is 4.", ["4"], question="2 + 2?")
    for _ in range(2):
        assert rewards.score([prompt] * 2, [trajectory] * 2)[:, -1].tolist() == pytest.approx([0.8, 0.8])
    assert len(judge.requests) == 4 and judge.requests[0] == judge.requests[3]
    key, request = judge.requests[0]
    assert key == "Bearer secret" and request["model"] == "strict" and request["temperature"] == 0
    assert json.loads(request["messages"][1]["content"]) == {
        "conversation": [{"role": "user", "content": "2 + 2?"}], "expected": ["4"],
        "answer": {"role": "assistant", "content": "Four is 4."}}


@pytest.mark.parametrize(("grade", "words"), [(400, "busy"), ("fine", "not a number from 0 to 10")])
def test_a_judge_that_gives_no_grade_is_a_failure_that_names_the_row(judge, grade, words):
    judge.grades = [grade]
    with pytest.raises(Failure, match=f"reward judge failed on rows.jsonl:7: .*{words}"):
        make(f"--judge_url={judge.url}").score(*map(lambda each: [each], sample("Hello.")))


@pytest.mark.parametrize(("reply", "grade"), [
    ("8", 8), ("7.5", 7.5), ("Grade: 10/10.", 10), ("评分：3", 3), ("8 out of 10", 8), ("<think>1 or 2</think>\n6", 6),
    ("11", None), ("-1", None), ("3 or 4", None), ("none", None), ("", None), ("100", None)])
def test_a_grade_is_the_one_number_of_the_reply(reply, grade):
    assert grade_of(reply) == grade
