"""The whole life of a model in one command: data, pretraining, SFT, LoRA, DPO, reward model, GRPO, agent, evaluation.

    python benchmarks/full_run.py --preset tiny                   # a toy on the sample world, minutes on two CPU cores
    python benchmarks/full_run.py --preset zero --stages data     # only tokenise: out/zero can be carried elsewhere
    python benchmarks/full_run.py --preset zero [--moe]           # 64 M (198 M), the mini files
    python benchmarks/full_run.py --preset full                   # 64 M, the long files

Each stage is its own script of trainer/ with its own flags; --set changes some (`--set pretrain.batch_size=16
all.device=cpu`). The same command goes on where it was stopped: a finished stage is not run again unless its flags, or
what it starts from, have changed. All it makes lies in out/{preset}[_moe], so that no other weight is overwritten, and
chat with it is `eval_llm.py --save_dir out/tiny`; the report goes to docs/report/. Data are the published files where
--data has them; where not, --data's own rows for pretrain, sft and dpo, and the synthetic sample world.
"""

import argparse
import json
import shutil
import signal
import sys
import time
from operator import itemgetter
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # the repository, not this folder

from benchmarks.full_report import write_report
from dataset.lm_dataset import parse_row, read_rows
from dataset.sample_world import write as write_sample
from model.chat import ChatTokenizer
from model.cli import Failure, Parser, UserError, nonneg_float, positive_int, run_main
from model.device import choose_device
from model.inference.engine import Sampling, generate
from model.loading import load_for_inference
from model.weights import OUT_DIR, ROOT, save_atomically
from scripts.lib.stages import CHAT, COMMON, STAGES, run
from scripts.score_sample import score

SAMPLE = {stage.name: stage for stage in STAGES}
NAMES = ("data", "pretrain", "full_sft", "lora_identity", "dpo", "reward", "grpo", "cispo", "agent", "evaluation")
PARENTS = {"data": None, "pretrain": "data", "full_sft": "pretrain", "evaluation": "full_sft"}  # others: full_sft
ROWS = {"pretrain": "pretrain", "full_sft": "sft", "lora_identity": "lora_identity", "dpo": "dpo", "reward": "dpo",
        "grpo": "rlaif", "cispo": "rlaif", "agent": "agent_rl"}  # what each stage reads
PUBLISHED = {"pretrain": "pretrain_t2t_mini", "sft": "sft_t2t_mini", "dpo": "dpo", "lora_identity": "lora_identity",
             "rlaif": "rlaif", "agent_rl": "agent_rl"}
LONG = PUBLISHED | {"pretrain": "pretrain_t2t", "sft": "sft_t2t"}
OWN = {"pretrain": ("pretrain",), "sft": ("sft", "sft_toolcall"), "dpo": ("dpo",)}  # of other --data folders
HELD_OUT = 200  # rows, at most, where a file has no {name}_val beside it
# the toy's size and how long each of its stages goes on
TOY = {"all": {"hidden_size": 64, "use_compile": 0, "save_interval": 100},
       "pretrain": {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "max_steps": 150},
       "full_sft": {"max_steps": 500}, "lora_identity": {"max_steps": 60}, "dpo": {"max_steps": 40},
       "reward": {"max_steps": 40}, "grpo": {"max_steps": 5}, "cispo": {"max_steps": 5}, "agent": {"max_steps": 3}}
BIG = {"use_compile": 1, "eval_interval": 500}  # beside the defaults of the stages, which are the published recipe
ROLLOUTS = {"batch_size": 8, "accumulation_steps": 4, "max_gen_len": 256, "max_steps": 200, "beta": 0.02,
            "learning_rate": 1e-6, "eval_interval": 20, "use_compile": 0}


def recipe(args: argparse.Namespace, place: Path) -> dict[str, dict]:
    """The flags of each stage that trains."""
    found = {}
    for name, kind in ROWS.items():
        tokens, rows = place / f"data/{kind}_tokens", place / f"data/{kind}.jsonl"
        flags = {"data_path": tokens if kind in ("pretrain", "sft") else rows,
                 "val_data_path": place / f"data/{kind}_val.jsonl", "save_dir": place,
                 "checkpoint_dir": place / "checkpoints", "cache_dir": place / "cache", "eval_first": 1}
        if args.preset == "tiny":
            words = [str(word).lstrip("-") if i % 2 == 0 else word for i, word in
                     enumerate((*COMMON, *SAMPLE[name].flags))]
            flags = dict(zip(words[::2], words[1::2], strict=True)) | flags | TOY["all"] | TOY[name]
        else:
            flags |= {"save_weight": name, **BIG, **(ROLLOUTS if kind in ("rlaif", "agent_rl") else {})}
            flags |= {"loss_type": name} if kind == "rlaif" else {}
        if kind in ("rlaif", "agent_rl"):  # prompts are not tokenised ahead
            del flags["cache_dir"]
        if name == "pretrain":
            flags |= {"use_moe": int(args.moe)}
        asked = [change.partition("=") for change in args.set]
        for who in ("all", name):
            flags |= {key.partition(".")[2]: value for key, _, value in asked if key.partition(".")[0] == who}
        found[name] = flags
    return found


# -- data --------------------------------------------------------------------------------------------------------------


def sources(kind: str, args: argparse.Namespace, sample: Path) -> list[Path]:
    """The files that rows of a kind are taken from: the published one, or what there is and the sample world."""
    def there(name: str) -> list[Path]:
        return [path for folder in args.data for end in (".jsonl", ".jsonl.gz")
                if (path := folder / f"{name}{end}").is_file()][:1]

    name = (LONG if args.preset == "full" else PUBLISHED)[kind]
    if args.preset != "tiny" and (published := there(name)) and published[0].suffix != ".gz":  # they come unpacked
        return published
    if args.preset == "full" and kind in ("pretrain", "sft"):
        raise UserError(f"--preset full: no {name}.jsonl in {', '.join(map(str, args.data))}; "
                        f"python scripts/download_data.py {name}.jsonl")
    own = [] if args.preset == "tiny" else [path for stem in OWN.get(kind, ()) for path in there(stem)]
    return [*own, sample / f"{kind}.jsonl"]


def token_flags(flags: dict) -> dict:
    """Those that tokens depend on."""
    return {key: value for key, value in flags.items()
            if key in ("max_seq_len", "seed", "system_prompt_ratio", "empty_think_ratio")}


def gather(files: list[Path], target: Path) -> int:
    """Join `files` into `target`, and what is held out of them into {target}_val. → rows"""
    held = target.with_name(f"{target.stem}_val.jsonl")
    ready = [path for file in files if (path := file.with_name(file.name.replace(".jsonl", "_val.jsonl"))).is_file()]
    rows = kept = 0
    with open(target, "wb") as train, open(held, "wb") as val:
        for path in ready:
            val.writelines(line for _, line in read_rows(path))
        for path in files:
            for _, line in read_rows(path):
                rows += 1
                to_hold = not ready and kept < HELD_OUT and rows % 20 == 0
                kept += to_hold
                (val if to_hold else train).write(line if line.endswith(b"\n") else line + b"\n")
    return rows


def prepare(args: argparse.Namespace, place: Path, flags: dict[str, dict]) -> dict:
    """Write the sample world, gather the rows of every kind, check the tokenizer on them, tokenise what is large."""
    data, found = place / "data", {"rows": {}}
    files = {kind: sources(kind, args, data / "sample") for kind in PUBLISHED}
    shutil.rmtree(data, ignore_errors=True)
    write_sample(data / "sample", scale=args.sample_scale)
    for kind, paths in files.items():
        rows = gather(paths, data / f"{kind}.jsonl")
        found["rows"][kind] = {"files": ["/".join(path.parts[-2:]) for path in paths], "rows": rows}
        print(f"data: {kind}: {rows:,} rows of {', '.join(map(str, paths))}".replace(f"{ROOT}/", ""), flush=True)
    tokenizer, texts = ChatTokenizer(), [parse_row(line)["text"] for _, line in read_rows(data / "pretrain_val.jsonl")]
    ids = tokenizer.encode_texts(texts)
    if changed := [text for text, of_text in zip(texts, ids, strict=True) if tokenizer.decode(of_text) != text]:
        raise Failure(f"the tokenizer in {tokenizer.folder} does not give {changed[0][:40]!r} back")
    found["bytes_per_token"] = sum(len(text.encode()) for text in texts) / sum(map(len, ids))
    print(f"tokenizer: {len(texts):,} texts come back as they were, {found['bytes_per_token']:.2f} bytes a token")
    for name, kind in (("pretrain", "pretrain"), ("full_sft", "sft")):
        run("scripts/prepare_data.py", "--kind", kind, "--data_path", data / f"{kind}.jsonl", "--out",
            data / f"{kind}_tokens", *(f"--{key}={value}" for key, value in token_flags(flags[name]).items()))
        (data / f"{kind}.jsonl").unlink()  # its tokens are all that is needed, and all that is to be carried
    return found


# -- evaluation --------------------------------------------------------------------------------------------------------


def evaluate(args: argparse.Namespace, place: Path, finished: list[str], flags: dict[str, dict]) -> dict:
    """What every weight that talks answers: the sample world's held-out cases, a few questions, tasks for tools."""
    cases = [parse_row(line) for _, line in read_rows(place / "data/sample/heldout.jsonl")]
    device, found = choose_device(flags["full_sft"].get("device", "auto")), {"exam": {}, "answers": {}}
    for name in finished:
        if name in ("data", "pretrain", "reward", "evaluation"):
            continue
        weight, lora = ("full_sft", name) if name == "lora_identity" else (name, None)
        model, tokenizer = load_for_inference("model", weight, place, None, device, lora_weight=lora)
        results = score(model, tokenizer, cases[::args.every])
        skills = {case["skill"]: [r["correct"] for r in results if r["skill"] == case["skill"]] for case in results}
        found["exam"][name] = {skill: sum(right) / len(right) for skill, right in skills.items()}
        prompts = [tokenizer.prompt([{"role": "user", "content": question}]) for question in CHAT]
        found["answers"][name] = {question: tokenizer.decode(answer.ids) for question, answer in
                                  zip(CHAT, generate(model, prompts, Sampling(96, temperature=0)), strict=True)}
        print(f"evaluation: {name}", *(f"{skill} {right:.0%}" for skill, right in found["exam"][name].items()))
    talkers = [name for name in ("full_sft", "agent") if name in finished]
    run("eval_toolcall.py", "--save_dir", place, "--device", device, "--weight", *talkers, "--benchmark",
        max(1, 48 // args.every), "--json", place / "tools.json", show=False)
    counted = json.loads((place / "tools.json").read_text("utf-8"))["weights"]
    found["tools"] = {name: {kind: f"{of['right']}/{of['of']}" for kind, of in kinds.items()}
                      for name, kinds in counted.items()}
    return found


# -- one stage after the other -----------------------------------------------------------------------------------------


def changes(record: dict, flags: dict, parent: dict | None) -> list[str]:
    """Why a stage that was begun has to begin anew."""
    found = [f"--{key} was {record['flags'].get(key)}, is {flags.get(key)}"
             for key in sorted({*record["flags"], *flags}) if record["flags"].get(key) != flags.get(key)]
    return found + ["what it starts from was made anew"] * (record["after"] != (parent or {}).get("ended"))


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=("tiny", "zero", "full"), required=True)
    parser.add_argument("--moe", action="store_true", help="4 experts a layer: 198 M parameters, 64 M active")
    parser.add_argument("--stages", nargs="+", choices=NAMES, default=[name for name in NAMES if name != "cispo"],
                        metavar="STAGE", help=f"only these of {' '.join(NAMES)} (default: all but cispo)")
    parser.add_argument("--data", type=Path, nargs="+", default=[ROOT / "dataset", ROOT.parent / "shared/data"],
                        help="folders of data files, the first that has one gives it (default: %(default)s)")
    parser.add_argument("--set", nargs="+", default=[], metavar="STAGE.FLAG=VALUE", help="a stage's flag; all: of all")
    parser.add_argument("--sample_scale", type=nonneg_float, default=1.0, help="factor on the sample world's rows")
    parser.add_argument("--every", type=positive_int, default=1, help="evaluate on every so manieth held-out case")
    parser.add_argument("--price-per-hour", "--price_per_hour", type=nonneg_float, default=1.3,
                        help="of this machine, in yuan (default: %(default)s, a rented 3090)")
    parser.add_argument("--save_dir", type=Path, default=OUT_DIR, help="where the run's folder is made (default: out)")
    parser.add_argument("--report_dir", type=Path, default=ROOT / "docs/report", help="default: docs/report")
    args = parser.parse_args()
    for change in args.set:
        if change.partition(".")[0] not in ("all", *ROWS) or "=" not in change.partition(".")[2]:
            parser.error(f"--set {change}: write STAGE.FLAG=VALUE with STAGE one of all {' '.join(ROWS)}")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: what runs saves first
    name = args.preset + ("_moe" if args.moe else "")
    place = args.save_dir.absolute() / name
    flags, kept = recipe(args, place), place / "run.json"
    records = json.loads(kept.read_text("utf-8")) if kept.is_file() else {}
    for stage in [stage for stage in NAMES if stage in args.stages]:
        asked = flags.get(stage) or {"data": {"sample_scale": args.sample_scale, **token_flags(flags["full_sft"])},
                                     "evaluation": {"every": args.every}}[stage]
        asked = {key: str(value).replace(str(place), ".") for key, value in asked.items()}  # also where it is carried
        before = PARENTS.get(stage, "full_sft")
        parent, record = records.get(before), records.get(stage)
        if before and not (parent and parent["done"]):
            raise UserError(f"--stages {stage}: begins with {before}, which is not done in {place}; name it too")
        if stage == "evaluation":  # of all there is
            parent = max((of for of in records.values() if of is not record and of["done"]), key=itemgetter("ended"))
        if record and (why := changes(record, asked, parent)):
            print(f"{stage}: begins anew: {'; '.join(why)}")
            record = None
        if record and record["done"]:
            print(f"{stage}: done before")
            continue
        if record is None:
            for old in (place / "checkpoints").glob(f"{stage}_*_resume.pth"):
                old.unlink()
            after = (parent or {}).get("ended")
            record = records[stage] = {"flags": asked, "after": after, "done": False, "seconds": 0.0}
        save_atomically(json.dumps(records, indent=1, ensure_ascii=False), kept)
        began = time.perf_counter()
        try:
            if stage == "data":
                record["found"] = prepare(args, place, flags)
            elif stage == "evaluation":
                record["found"] = evaluate(args, place, [done for done in NAMES if records.get(done, {}).get("done")],
                                           flags)
            else:
                words = [f"--{key}={value}" for key, value in flags[stage].items()]
                said = run(SAMPLE[stage].script, *words, "--from_resume=1")
                if "train: stopped by signal" in said:
                    raise KeyboardInterrupt
            record |= {"done": True, "ended": time.time()}
        finally:
            record["seconds"] += time.perf_counter() - began
            save_atomically(json.dumps(records, indent=1, ensure_ascii=False), kept)
    write_report(name, place, records, args.report_dir, args.price_per_hour)


if __name__ == "__main__":
    run_main(main)
