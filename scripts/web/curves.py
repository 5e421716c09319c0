"""Training curves, drawn while the runs write them: one line per run, one chart per quantity of its log."""

import json
import time
from pathlib import Path

import altair
import streamlit as st

from scripts.web.parts import PERSIST, parse_args, tr

DEFAULT_CHARTS = ("loss", "lr", "grad_norm", "tokens_per_s")  # in this order; what else a stage logs, on demand
MAX_POINTS = 800  # to which a line is thinned
LIVE_SECONDS = 90  # since the last line, within which a run counts as running


def main() -> None:
    st.set_page_config(layout="wide")
    with st.sidebar:
        st.caption(tr("Every run that writes a log, redrawn every two seconds while it trains.",
                       "每一次写日志的训练；训练时每两秒重画一次。"))
    curves()


def read_runs(folder: Path) -> dict[str, list[dict]]:
    """The logs of `folder`, the newest first: name → its rows. Half a line at the end is not there yet."""
    paths = sorted(folder.glob("*.jsonl"), key=lambda path: -path.stat().st_mtime)
    return {path.stem: rows for path in paths if (rows := read_rows(path))}


def read_rows(path: Path) -> list[dict]:
    rows = []
    for line in path.read_text("utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), (int, float)):
            rows.append(row)
    return rows


@st.fragment(run_every=2)
def curves() -> None:
    """The page; it reads new lines every two seconds."""
    folder = parse_args().save_dir / "logs"
    runs = read_runs(folder)
    if not runs:
        st.markdown(tr("#### No training log yet", "#### 还没有训练日志"))
        st.markdown(tr(f"Every stage writes one into `{folder}`, and its curves appear here while it trains.",
                        f"每个训练阶段都会在 `{folder}` 里写日志，曲线会在训练时出现在这里。"))
        st.code("python trainer/train_pretrain.py", language="bash")
        return
    chosen = st.pills(tr("Runs", "训练"), list(runs), selection_mode="multi", default=list(runs)[:4], key="runs",
                      label_visibility="collapsed", **PERSIST)
    chosen = [name for name in chosen if name in runs]
    if not chosen:
        st.caption(tr("Choose a run.", "选择一次训练。"))
        return
    newest = chosen[0]
    metric_tiles(newest, runs[newest], time.time() - (folder / f"{newest}.jsonl").stat().st_mtime)
    known = {key for name in chosen for row in runs[name] for key in row if isinstance(row[key], (int, float))}
    others = sorted(known - {*DEFAULT_CHARTS, "step", "tokens", "epoch", "val_loss"})
    with st.container(horizontal=True, vertical_alignment="center"):
        axis = st.segmented_control(tr("Over", "横轴"), ("step", "tokens"), default="step", required=True, key="axis",
                                    label_visibility="collapsed", **PERSIST)
        logarithmic = st.toggle(tr("Logarithmic loss", "对数损失"), key="logarithmic", **PERSIST)
        more = st.pills(tr("More", "更多"), others, selection_mode="multi", key="more", **PERSIST,
                        label_visibility="collapsed")
    shown = [key for key in (*DEFAULT_CHARTS, *more) if key in known] or others[:1]  # online RL validates first
    rows = [{"run": name, **row} for name in chosen for row in thinned(runs[name])]
    st.altair_chart(chart(rows, shown[0], axis, chosen, 320, logarithmic and shown[0] == "loss"), width="stretch",
                    key="chart_first")
    for begin in range(1, len(shown), 3):
        for column, key in zip(st.columns(3), shown[begin:begin + 3], strict=False):
            column.altair_chart(chart(rows, key, axis, chosen, 200), width="stretch", key=f"chart_{key}")


def metric_tiles(name: str, rows: list[dict], age: float) -> None:
    """The newest run in numbers."""
    last = {key: value for row in rows for key, value in row.items()}
    state = f":green-badge[:material/radio_button_checked: {tr('training', '训练中')}]" if age < LIVE_SECONDS else \
        f":gray-badge[{tr('written', '写于')} {ago(age)}]"
    st.markdown(f"**{name}** &nbsp; {state}")
    metrics = [(tr("Step", "步"), f"{last['step']:,}"), (tr("Loss", "损失"), number(last.get("loss"))),
               (tr("Validation", "验证损失"), number(last.get("val_loss"))),
               (tr("Tokens", "Token 数"), f"{last.get('tokens', 0) / 1e6:.2f} M"),
               (tr("Tokens/s", "Token/秒"), f"{last.get('tokens_per_s', 0):,.0f}")]
    for column, (label, value) in zip(st.columns(len(metrics)), metrics, strict=True):
        column.metric(label, value)


def number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"


def ago(seconds: float) -> str:
    for size, english, chinese in ((86400, "d", "天"), (3600, "h", "小时"), (60, "min", "分钟")):
        if seconds >= size:
            return tr(f"{seconds / size:.0f} {english} ago", f"{seconds / size:.0f} {chinese}前")
    return tr("just now", "刚刚")


def thinned(rows: list[dict]) -> list[dict]:
    """At most about MAX_POINTS rows, evenly chosen; the last, and those with a validation, always among them."""
    stride = -(-len(rows) // MAX_POINTS)
    return [row for i, row in enumerate(reversed(rows)) if i % stride == 0 or "val_loss" in row][::-1]


def chart(rows: list[dict], key: str, axis: str, runs: list[str], height: int,
          logarithmic: bool = False) -> altair.Chart:
    """`key` of every run over steps or tokens; the validation loss as points on the loss."""
    points = [{"run": row["run"], axis: row[axis], key: row[key]} for row in rows if key in row and axis in row]
    colour = altair.Color("run:N", sort=runs, scale=altair.Scale(domain=runs), title=None,
                          legend=altair.Legend(orient="top-right") if len(runs) > 1 and height > 250 else None)
    scale = altair.Scale(type="log" if logarithmic else "linear", zero=False, nice=not logarithmic)
    digits = "~s" if max((abs(point[key]) for point in points), default=0) >= 1000 else "~g"

    def layer(values: list[dict], value: str) -> altair.Chart:
        return altair.Chart(altair.Data(values=values)).encode(
            x=altair.X(f"{axis}:Q", title=None, axis=altair.Axis(format="~s", grid=False)),
            y=altair.Y(f"{value}:Q", title=None, scale=scale, axis=altair.Axis(format=digits, tickCount=5)),
            color=colour, tooltip=["run:N", f"{axis}:Q", altair.Tooltip(f"{value}:Q", format=".4g")])

    lines = layer(points, key).mark_line(strokeWidth=2, interpolate="monotone")
    if key == "loss":
        validated = [{"run": row["run"], axis: row[axis], "val_loss": row["val_loss"]}
                     for row in rows if "val_loss" in row and axis in row]
        lines = lines + layer(validated, "val_loss").mark_point(size=70, filled=True, opacity=1)
    return lines.properties(height=height, title=altair.TitleParams(key, anchor="start"))


if __name__ == "__main__":
    main()
