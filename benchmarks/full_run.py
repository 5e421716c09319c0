"""Every stage in one command: data, pretraining, SFT, LoRA, DPO, reward model, GRPO, agent, evaluation, report.

    python benchmarks/full_run.py --preset tiny                   # a toy on the sample world, minutes on two CPU cores
    python benchmarks/full_run.py --preset cpu                    # real text, a small model, hours on two CPU cores
    python benchmarks/full_run.py --preset zero --stages data     # only tokenise: out/zero can be carried elsewhere
    python benchmarks/full_run.py --preset zero [--moe]           # 64 M (198 M), the mini files
    python benchmarks/full_run.py --preset full                   # 64 M, the long files

Each stage is its own script of trainer/ with its own flags; --set changes some (`--set pretrain.batch_size=16
all.device=cpu`). The same command goes on where it was stopped: a finished stage is not run again unless its flags, or
what it starts from, have changed. Everything is written to out/{preset}[_moe], so that no other weight is overwritten
(to chat: `eval_llm.py --save_dir out/tiny`), and the report to docs/report/. The data are the published files where
--data has them; otherwise --data's own rows (pretrain, sft, sft_toolcall, dpo, rlaif), and the synthetic sample world.

To compare with the plain recipe (padded rows, fp32, AdamW, eager) after the same time, name the stages plain_pretrain
and plain_sft, too, and give them the share of the data that this time allows (`--set plain_pretrain.epochs=0.1`).
"""

import argparse
import json
import re
import shutil
import signal
import sys
from collections import defaultdict
from dataclasses import replace
from functools import partial
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # the repository, not this folder

from benchmarks.full_report import write_report
from dataset.reader import read_lines, read_rows
from dataset.sample_world import write as write_sample
from model.chat import ChatTokenizer
from model.cli import CHINESE, Failure, Parser, UserError, nonneg_float, positive_int, run_main
from model.device import choose_device
from model.inference.engine import SamplingParams, generate
from model.loading import load_for_inference
from model.weights import OUT_DIR, ROOT
from scripts.eval_benchmark import answer, measure_context, measure_texts, read_texts, summarise
from scripts.lib import stages
from scripts.lib.benchmark_formats import read_questions
from scripts.lib.stages import CHAT, Pipeline, run
from scripts.score_sample import score, share_per_skill

STAGES = {stage.name: stage for stage in stages.STAGES if stage.name not in ("small_sft", "full_dist", "ppo_actor")}
STAGES["reward"] = replace(STAGES["reward"], rows="dpo")  # the published data have no pairs of their own for it
PLAIN_STAGES = {"plain_pretrain": "pretrain", "plain_sft": "full_sft"}  # the same stages by the plain recipe
STAGES |= {name: replace(STAGES[stage], name=name) for name, stage in PLAIN_STAGES.items()}
NAMES = ("data", *STAGES, "evaluation")
OPTIONAL = ("cispo", *PLAIN_STAGES)  # only where --stages names them

# the flags of a preset: for all stages, then for each; tiny: beside those of the demo
TINY = {"all": {"hidden_size": 64, "use_compile": 0, "save_interval": 100},
        "pretrain": {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "max_steps": 150},
        "full_sft": {"max_steps": 500}, "lora_identity": {"max_steps": 60}, "dpo": {"max_steps": 40},
        "reward": {"max_steps": 40}, "grpo": {"max_steps": 5}, "cispo": {"max_steps": 5}, "agent": {"max_steps": 3}}
ROLLOUTS = {"batch_size": 8, "accumulation_steps": 4, "max_gen_len": 256, "max_steps": 200, "beta": 0.02,
            "learning_rate": 1e-6, "eval_interval": 20, "use_compile": 0}
ONLINE = {"optimizer": "adamw", "learning_rate": 3e-5, "num_generations": 8, "max_gen_len": 96, "use_compile": 0,
          "accumulation_steps": 4, "max_steps": 30, "log_interval": 1, "eval_interval": 10, "loss_type": "grpo"}
REWARD_MODEL = {"reward_weight": "reward"}  # beside the rules
PUBLISHED = {"all": {"use_compile": 1, "eval_interval": 500},  # the stages' defaults are the published recipe
             "grpo": {**ROLLOUTS, **REWARD_MODEL, "loss_type": "grpo"},
             "cispo": {**ROLLOUTS, **REWARD_MODEL, "loss_type": "cispo"}, "agent": ROLLOUTS}
PAIRS = {"optimizer": "adamw", "batch_size": 2, "accumulation_steps": 4, "max_steps": 60, "log_interval": 5,
         "eval_interval": 20}
# about three and a half hours on two cores with bf16 units: one pass over ../shared/data
CPU = {"all": {"hidden_size": 256, "use_compile": 1, "optimizer": "muon", "weight_decay": 0.1, "epochs": 1,
               "batch_size": 8, "accumulation_steps": 1, "eval_interval": 500, "save_interval": 200},
       "pretrain": {"num_hidden_layers": 8, "max_seq_len": 512, "learning_rate": 2e-3},
       "full_sft": {"max_seq_len": 512, "learning_rate": 1e-3},
       "lora_identity": {"optimizer": "adamw", "learning_rate": 1e-3, "epochs": 4},
       "dpo": {**PAIRS, "learning_rate": 1e-5}, "reward": {**PAIRS, "learning_rate": 1e-4},
       "grpo": {**ONLINE, **REWARD_MODEL}, "cispo": {**ONLINE, **REWARD_MODEL, "loss_type": "cispo"},
       "agent": {**ONLINE, "num_generations": 4}}
PLAIN = {"packing": 0, "dtype": "float32", "use_compile": 0, "optimizer": "adamw", "weight_decay": 0.01}
PRESETS = {"tiny": TINY, "cpu": CPU, "zero": PUBLISHED, "full": PUBLISHED}

# the published file of each kind of rows, and what serves instead in other --data folders, beside the sample world
MINI = {"pretrain": "pretrain_t2t_mini", "sft": "sft_t2t_mini", "dpo": "dpo", "lora_identity": "lora_identity",
        "rlaif": "rlaif", "agent_rl": "agent_rl"}
FILES = {"tiny": MINI, "cpu": MINI, "zero": MINI, "full": {**MINI, "pretrain": "pretrain_t2t", "sft": "sft_t2t"}}
SUBSTITUTES = {"pretrain": ("pretrain",), "sft": ("sft", "sft_toolcall"), "dpo": ("dpo",), "rlaif": ("rlaif",)}
TOKENISED = ("pretrain", "sft")  # ahead, because they are large
BENCHMARKS = {"cmmlu": "cmmlu_test_subset.jsonl", "arc": "arc_easy.jsonl", "piqa": "piqa.jsonl",
              "openbookqa": "openbook_qa.jsonl"}  # in the folder eval of --data
LENGTHS = [288, 384, 512, 1024, 2048, 4096, 8192]  # of the windows of a long text, which end in 256 predicted tokens
PROMPTS = (
    *CHAT, "请介绍一下你自己。", "为什么天空是蓝色的？", "怎样才能睡得更好？",
    "请写一首关于秋天的短诗。", "把下面的句子翻译成英文：今天天气很好。", "我最近压力很大，应该怎么办？",
    "推荐三种健康的早餐。", "中国的首都是哪里？", "What is the capital of France?",
    "Explain in one sentence what a computer program is.",
    "Write a short story about a fox and a river.", "How do I make a cup of tea?",
    "Give me three tips for learning a language.", "Tom has 3 apples and buys 5 more. How many does he have?",
    "What is the difference between a list and a tuple in Python?", "Tell me something about the moon.")
MAX_HELD_OUT = 200  # rows, where a file has no {name}_val beside it


def recipe(args: argparse.Namespace, folder: Path) -> dict[str, dict]:
    """The flags of each stage that trains: the preset's, then paths, then --set."""
    preset, flags_of = PRESETS[args.preset], {}
    for name, stage in STAGES.items():
        flags = stage.sample_flags if preset is TINY else {}
        flags |= preset["all"] | preset.get(PLAIN_STAGES.get(name, name), {}) | stage.data_flags(folder / "data")
        if name in PLAIN_STAGES:
            flags |= PLAIN
        flags |= {"save_weight": name, "save_dir": folder, "checkpoint_dir": folder / "checkpoints", "eval_first": 1}
        if stage.rows in TOKENISED:
            flags["data_path"] = folder / f"data/{stage.rows}_tokens"
        if stage.rows not in ("rlaif", "agent_rl"):  # whose prompts are not tokenised ahead
            flags["cache_dir"] = folder / "cache"
        if stage.script.endswith("pretrain.py"):
            flags["use_moe"] = int(args.moe)
        if name == "plain_sft":
            flags["from_weight"] = "plain_pretrain"
        for target in ("all", name):
            flags |= {flag: value for changed, flag, value in args.set if changed == target}
        flags_of[name] = flags
    return flags_of


def parents(step: str, flags: dict[str, dict]) -> list[str]:
    """The steps whose results a step works with."""
    if step == "data":
        return []
    parent = {"pretrain": "data", "full_sft": "pretrain",
              "plain_pretrain": "data", "plain_sft": "plain_pretrain"}.get(step, "full_sft")
    return [parent, "reward"] if flags.get(step, {}).get("reward_weight") == "reward" else [parent]


# -- data --------------------------------------------------------------------------------------------------------------


def find(folders: list[Path], *names: str) -> Path | None:
    """The first of `names` that there is in the first of `folders` that has one."""
    return next((path for folder in folders for name in names if (path := folder / name).is_file()), None)


def sources(rows: str, args: argparse.Namespace, sample: Path) -> list[Path]:
    """The files that rows of a kind are taken from: the published one, or what there is and the sample world."""
    if args.preset == "tiny":
        return [sample / f"{rows}.jsonl"]
    name = FILES[args.preset][rows]
    published = find(args.data, f"{name}.jsonl", f"{name}.jsonl.gz")
    if published and published.suffix != ".gz":  # the published files come unpacked
        return [published]
    if args.preset == "full" and rows in TOKENISED:
        raise UserError(f"--preset full: no {name}.jsonl in {', '.join(map(str, args.data))}; "
                        f"python scripts/download_data.py {name}.jsonl")
    substitutes = (find(args.data, f"{name}.jsonl", f"{name}.jsonl.gz") for name in SUBSTITUTES.get(rows, ()))
    return [*filter(None, substitutes), sample / f"{rows}.jsonl"]


def token_flags(flags: dict) -> dict:
    """The flags that tokens depend on."""
    return {key: flags[key] for key in ("max_seq_len", "seed", "system_prompt_ratio", "empty_think_ratio")
            if key in flags}


def gather(files: list[Path], target: Path) -> int:
    """Join `files` into `target`, and what is held out of them into {target}_val: {file}_val, else every 20th row.

    → rows, except those of {file}_val
    """
    num_rows = 0
    with open(target, "wb") as train, open(target.with_name(f"{target.stem}_val.jsonl"), "wb") as val:
        for file in files:
            val_file, num_held_out = file.with_name(file.name.replace(".jsonl", "_val.jsonl")), 0
            if has_val_file := val_file.is_file():
                val.writelines(line.rstrip(b"\r\n") + b"\n" for _, line in read_lines(val_file))
            for row, (_, line) in enumerate(read_lines(file), 1):
                hold_out = not has_val_file and num_held_out < MAX_HELD_OUT and row % 20 == 0
                num_held_out += hold_out
                num_rows += 1
                (val if hold_out else train).write(line if line.endswith(b"\n") else line + b"\n")
    return num_rows


def prepare(args: argparse.Namespace, folder: Path, flags: dict[str, dict]) -> dict:
    """Write the sample world, gather the rows of every kind, check the tokenizer on them, tokenise what is large."""
    data, result = folder / "data", {"rows": {}}
    files = {rows: sources(rows, args, data / "sample") for rows in MINI}
    shutil.rmtree(data, ignore_errors=True)
    write_sample(data / "sample", scale=args.sample_scale)
    for rows, paths in files.items():
        num_rows = gather(paths, data / f"{rows}.jsonl")
        result["rows"][rows] = {"files": ["/".join(path.parts[-2:]) for path in paths], "rows": num_rows}
        print(f"data: {rows}: {num_rows:,} rows of {', '.join(map(str, paths))}".replace(f"{ROOT}/", ""), flush=True)
    tokenizer, texts = ChatTokenizer(), [row["text"] for _, row in read_rows(data / "pretrain_val.jsonl")]
    ids = tokenizer.encode_texts(texts)
    if changed := [text for text, text_ids in zip(texts, ids, strict=True) if tokenizer.decode(text_ids) != text]:
        raise Failure(f"the tokenizer in {tokenizer.folder} does not give {changed[0][:40]!r} back")
    result["bytes_per_token"] = sum(len(text.encode()) for text in texts) / sum(map(len, ids))
    print(f"tokenizer: {len(texts):,} texts come back as they were, {result['bytes_per_token']:.2f} bytes per token")
    for name, rows in (("pretrain", "pretrain"), ("full_sft", "sft")):
        run("scripts/prepare_data.py", {"kind": rows, "data_path": data / f"{rows}.jsonl",
                                        "out": data / f"{rows}_tokens", **token_flags(flags[name])})
        (data / f"{rows}.jsonl").unlink()  # its tokens are all that is needed, and all that is to be carried
    return result


# -- training and evaluation -------------------------------------------------------------------------------------------


def train(script: str, flags: dict) -> None:
    """Run a stage from its last checkpoint, if any. Raises KeyboardInterrupt when a signal stopped it."""
    if "train: stopped by signal" in run(script, flags | {"from_resume": 1}):
        raise KeyboardInterrupt


def discard_checkpoints(folder: Path, name: str) -> None:
    for path in (folder / "checkpoints").glob(f"{name}_*_resume.pth"):
        path.unlink()


def evaluate(args: argparse.Namespace, folder: Path, finished: dict[str, float], flags: dict[str, dict]) -> dict:
    """What every weight knows and answers: held-out text, benchmarks, the sample world's held-out cases, PROMPTS."""
    cases = [row for _, row in read_rows(folder / "data/sample/heldout.jsonl")]
    texts = [row["text"] for _, row in read_rows(folder / "data/pretrain_val.jsonl")]
    languages = {"zh": [text for text in texts if CHINESE.search(text)],
                 "en": [text for text in texts if not CHINESE.search(text)]}
    benchmarks = {name: read_questions(name, path)[::args.every] for name, file in BENCHMARKS.items()
                  if (path := find(args.data, f"eval/{file}"))}
    device, result = choose_device(flags["full_sft"].get("device", "auto")), {
        "bits_per_byte": {}, "benchmarks": {}, "exam": {}, "answers": {}, "sampled": {}}
    sizes = {"hidden_size": int(flags["pretrain"].get("hidden_size", 768)), "use_moe": args.moe}  # as of no earlier run
    for name in (name for name, stage in STAGES.items() if name in finished and name != "reward"):
        weight, lora = ("full_sft", name) if name == "lora_identity" else (name, None)
        model, tokenizer = load_for_inference("model", weight, folder, None, device, **sizes, lora_weight=lora)
        result["bits_per_byte"][name] = {
            language: measure_texts(model, tokenizer, documents[::args.every], 512)["bits_per_byte"]
            for language, documents in languages.items() if documents[::args.every]}
        result["benchmarks"][name] = {benchmark: summarise(answer(model, tokenizer, questions))
                                      for benchmark, questions in benchmarks.items()}
        if STAGES[name].answers:
            result["exam"][name] = share_per_skill(score(model, tokenizer, cases[::args.every]))
            prompts = [tokenizer.prompt([{"role": "user", "content": question}]) for question in PROMPTS]
            for kind, temperature in (("answers", 0), ("sampled", 0.85)):
                sequences = generate(model, prompts, SamplingParams(128, temperature, top_p=0.95, seed=0))
                result[kind][name] = {question: tokenizer.decode(sequence.completion_ids)
                                      for question, sequence in zip(PROMPTS, sequences, strict=True)}
        print(f"evaluation: {name}", *(f"{language} {value:.3f}" for language, value in
                                       result["bits_per_byte"][name].items()),
              *(f"{skill} {right:.0%}" for skill, right in result["exam"].get(name, {}).items()), flush=True)
        if name == "full_sft" and (path := find(args.data, "long_zh.txt.gz")):
            ids = tokenizer.encode_text("\n".join(read_texts(path)))
            result["context"] = {"lengths": LENGTHS, **measure_context(model, ids, LENGTHS)}
    flags_of_tools = {"save_dir": folder, "device": device, "hidden_size": sizes["hidden_size"],
                      "use_moe": int(args.moe),
                      "weight": tuple(name for name in ("full_sft", "agent") if name in finished)}
    kinds = {"sample": {"benchmark": max(1, 48 // args.every)}}
    if path := find(args.data, "eval/bfcl_simple.jsonl"):
        kinds["bfcl"] = {"cases": path}
    result["tools"] = defaultdict(dict)
    for kind, more in kinds.items():
        run("eval_toolcall.py", flags_of_tools | more | {"json": folder / f"tools_{kind}.json"}, show=False)
        weights = json.loads((folder / f"tools_{kind}.json").read_text("utf-8"))["weights"]
        for name, counts in weights.items():
            result["tools"][name] |= {task: f"{count['right']}/{count['of']}" for task, count in counts.items()}
    return result


# -- the program -------------------------------------------------------------------------------------------------------


def flag_change(text: str) -> tuple[str, str, str]:
    """STAGE.FLAG=VALUE → its parts."""
    if match := re.fullmatch(rf"({'|'.join(('all', *STAGES))})\.(\w+)=(.*)", text):
        return match.groups()
    raise argparse.ArgumentTypeError(f"{text}: write STAGE.FLAG=VALUE with STAGE one of all {' '.join(STAGES)}")


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, required=True)
    parser.add_argument("--moe", action="store_true", help="4 experts per layer: 198 M parameters, 64 M active")
    parser.add_argument("--stages", nargs="+", choices=NAMES, default=[name for name in NAMES if name not in OPTIONAL],
                        metavar="STAGE",
                        help=f"only these of {' '.join(NAMES)} (default: all but {', '.join(OPTIONAL)})")
    parser.add_argument("--data", type=Path, nargs="+", default=[ROOT / "dataset", ROOT.parent / "shared/data"],
                        help="folders of data files, the first that has one gives it (default: %(default)s)")
    parser.add_argument("--set", nargs="+", type=flag_change, default=[], metavar="STAGE.FLAG=VALUE",
                        help="a stage's flag; all: of all stages")
    parser.add_argument("--sample_scale", type=nonneg_float, default=1.0, help="factor on the sample world's rows")
    parser.add_argument("--every", type=positive_int, default=1, help="evaluate on every n-th held-out case only")
    parser.add_argument("--price-per-hour", "--price_per_hour", type=nonneg_float, default=1.3,
                        help="of this machine, in yuan (default: %(default)s, a rented 3090)")
    parser.add_argument("--save_dir", type=Path, default=OUT_DIR, help="where the run's folder is made (default: out)")
    parser.add_argument("--report_dir", type=Path, default=ROOT / "docs/report", help="default: docs/report")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: what runs saves first
    name = args.preset + ("_moe" if args.moe else "")
    folder = args.save_dir.absolute() / name
    flags, pipeline = recipe(args, folder), Pipeline(folder / "run.json")
    # what the result of each step depends on, and the work
    steps = {"data": ({"sample_scale": args.sample_scale, **token_flags(flags["full_sft"])},
                      lambda: prepare(args, folder, flags))}
    steps |= {step: (flags[step], partial(train, stage.script, flags[step])) for step, stage in STAGES.items()}
    steps["evaluation"] = ({"every": args.every, "prompts": len(PROMPTS)},
                           lambda: evaluate(args, folder, pipeline.end_times(), flags))
    for step in args.stages:
        for parent in parents(step, flags):
            if parent not in {*pipeline.end_times(), *args.stages}:
                raise UserError(f"--stages {step}: works with {parent}, which is not done in {folder}; name it too")
    for step in sorted(args.stages, key=NAMES.index):
        ended, (depends_on, work) = pipeline.end_times(), steps[step]
        # evaluation comes after every other step
        before = [name for name in ended if name != step] if step == "evaluation" else parents(step, flags)
        after = max((ended[name] for name in before), default=None)
        depends_on = {key: str(value).replace(str(folder), ".") for key, value in depends_on.items()}  # folders move
        pipeline.run(step, depends_on, work, after, partial(discard_checkpoints, folder, step))
    write_report(name, folder, pipeline.records, args.report_dir, args.price_per_hour)


if __name__ == "__main__":
    run_main(main)
