"""The surprise of each token of a sentence under the demo's model, as `python docs/figures/surprise.py` measured it."""

import json
import sys
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

DATA = Path(__file__).parent / "data/surprise.json"
TEXT = '"Where do you live, Jack Dale?" "I live in Rosazu." "What do you eat in Rosazu, Jack Dale?"'


def measure() -> None:
    """Write -ln p of every token of TEXT under out/pretrain_128.pth."""
    import torch

    from model.chat import BOS, ChatTokenizer
    from model.weights import OUT_DIR, load_weight

    tokenizer = ChatTokenizer()
    model, _ = load_weight("pretrain", OUT_DIR, 128, False, tokenizer)
    ids = torch.tensor([BOS, *tokenizer.encode_text(TEXT)])
    with torch.no_grad():
        log_p = model.eval().float()(ids[None]).logits[0].log_softmax(-1)
    nats = -log_p[:-1].gather(1, ids[1:, None])[:, 0]
    rows = [[tokenizer.decode([token]), round(value, 3)]
            for token, value in zip(ids[1:].tolist(), nats.tolist(), strict=True)]
    DATA.write_text(json.dumps(rows, ensure_ascii=False) + "\n", "utf-8")


def draw() -> Figure:
    rows = json.loads(DATA.read_text("utf-8"))
    figure, axes = plt.subplots(figsize=(9, 3))
    axes.bar(range(len(rows)), [nats for _, nats in rows], color=["C1" if nats > 0.3 else "C0" for _, nats in rows])
    axes.set_xticks(range(len(rows)), [text.replace(" ", "·") for text, _ in rows], rotation=90, fontsize=9)
    axes.set_ylabel("−ln p (nats)")
    axes.margins(x=0.01)
    return figure


if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[2])
    from model.cli import run_main

    run_main(measure)
