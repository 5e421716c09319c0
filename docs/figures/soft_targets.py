"""The demo's distribution of one token at three temperatures, as `python docs/figures/soft_targets.py` measured it."""

import json
import sys
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

DATA = Path(__file__).parent / "data/soft_targets.json"
CHAT = [{"role": "user", "content": "What does the river mouse eat?"}]
ANSWER = "The river mouse eats"
TOP = 4
TEMPERATURES = (1, 2, 4)


def measure() -> None:
    """Write the likeliest next tokens after ANSWER under out/full_sft_128.pth, and their logits."""
    import torch

    from model.chat import ChatTokenizer
    from model.weights import OUT_DIR, load_weight

    tokenizer = ChatTokenizer()
    model, _ = load_weight("full_sft", OUT_DIR, 128, False, tokenizer)
    ids = torch.tensor([tokenizer.prompt(CHAT) + tokenizer.encode_text(ANSWER)])
    with torch.no_grad():
        logits = model.eval().float()(ids).logits[0, -1]
    top = logits.topk(TOP).indices.tolist()
    probabilities = {str(T): (logits / T).softmax(-1)[top].tolist() for T in TEMPERATURES}
    DATA.write_text(json.dumps({"tokens": [tokenizer.decode([i]) for i in top], "p": probabilities,
                                "others": tokenizer.vocab_size - TOP}) + "\n", "utf-8")


def draw() -> Figure:
    data = json.loads(DATA.read_text("utf-8"))
    figure, axes = plt.subplots(figsize=(7.5, 3))
    width = 0.27
    for number, (T, p) in enumerate(data["p"].items()):
        p = [*p, 1 - sum(p)]
        axes.bar([i + (number - 1) * width for i in range(len(p))], [100 * x for x in p], width, label=f"T = {T}")
    labels = [*(f"“{token.strip()}…”" for token in data["tokens"]), f"{data['others']:,} others"]
    axes.set_xticks(range(len(labels)), labels)
    axes.set(ylabel="probability, %")
    axes.legend()
    return figure


if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[2])
    from model.cli import run_main

    run_main(measure)
