"""What the pages of the web demo share: two languages, the choice of a model, settings, and how an answer is drawn."""

import argparse
import re
import time
from collections.abc import Callable
from pathlib import Path

import streamlit as st

from model.cli import Failure, Parser, port_number
from model.device import choose_device
from model.inference.engine import SamplingParams
from model.loading import add_folder_args, continues_text, load_for_inference
from model.model_lora import compatible_adapters
from model.transformers_io import load_folder
from model.weights import find_models, load_weight, weights_hash
from scripts.lib.openai_client import LOCAL_SERVER
from scripts.web.answers import LocalModel, RemoteModel, Reply

ENGLISH, CHINESE = "English", "中文"
STYLE = """<style>
.stChatMessage:has([aria-label="Chat message from user"]) { background: rgba(127, 133, 120, .12); }
</style>"""
PERSIST = {"persist_state": "session"}  # a setting survives the visit of another page


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(description="Chat with the models of this machine, or of any OpenAI-compatible URL, in a browser.",
                    formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add_folder_args(parser)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 opens it to the network")
    parser.add_argument("--port", type=port_number, default=8501, help="port to listen on")
    return parser.parse_args(argv)


def tr(english: str, chinese: str) -> str:
    """The text in the language of the page."""
    return chinese if st.session_state.get("language") == CHINESE else english


def sidebar_header() -> None:
    """The title and the choice of a language, at the top of the sidebar of every page."""
    st.html(STYLE)
    st.markdown("### MiniMind")
    if "language" not in st.session_state:
        st.session_state.language = CHINESE if (st.context.locale or "").startswith("zh") else ENGLISH
    st.segmented_control("Language / 语言", (ENGLISH, CHINESE), key="language", required=True, **PERSIST,
                         label_visibility="collapsed", width="stretch")


# -- models ------------------------------------------------------------------------------------------------------------


@st.cache_resource(max_entries=3, show_spinner=False, hash_funcs={argparse.Namespace: str})
def load(name: str, modified: tuple[float, ...], args: argparse.Namespace, lora: str | None) -> LocalModel:
    """The model called `name`, loaded once for all pages until a file of it is written again (`modified`)."""
    source = find_models(args.save_dir)[name]
    model, tokenizer = load_for_inference(**source, tokenizer_dir=args.tokenizer, device=choose_device(args.device),
                                          lora_weight=lora)
    return LocalModel(model, tokenizer, continues_text(source["load_from"], source["weight"]))


@st.cache_data(show_spinner=False)
def base_hash(name: str, modified: float, save_dir: Path) -> str:
    """The weights_hash by which LoRAs know the model called `name`."""
    source = find_models(save_dir)[name]
    model, _ = load_folder(source["load_from"]) if source["load_from"] != "model" else load_weight(
        source["weight"], save_dir, source["hidden_size"], source["use_moe"])
    return weights_hash(model)


def local_model(name: str, key: str) -> LocalModel | None:
    """The model called `name`, with a LoRA if one fits and is chosen; None, and an error on the page, if it fails."""
    args, lora = parse_args(), None
    source, folder = find_models(args.save_dir)[name], args.save_dir
    path = folder / f"{name}.pth" if source["load_from"] == "model" else Path(source["load_from"])
    try:
        modified = [path.stat().st_mtime]
        if any(folder.glob("lora_*.pth")) and (names := compatible_adapters(
                folder, base_hash(name, modified[0], folder))):
            lora = st.selectbox("LoRA", (None, *names), key=f"lora_{key}_{name}", **PERSIST,
                                format_func=lambda value: value or tr("no LoRA", "不用 LoRA"))
        if lora:
            modified += [path.stat().st_mtime for path in folder.glob(f"{lora}_*.pth")]
        with st.spinner(tr(f"Loading {name}…", f"正在载入 {name}…")):
            return load(name, tuple(modified), args, lora)
    except (Failure, OSError) as error:
        st.error(str(error), icon=":material/error:")
        return None


def choose_model() -> LocalModel | RemoteModel | None:
    """Controls for a model of this machine or a URL. → None while there is none"""
    sources = {"local": tr("This machine", "本机"), "url": tr("A URL", "网址")}
    source = st.segmented_control(tr("Model", "模型"), tuple(sources), format_func=sources.get, key="source",
                                  default="local", required=True, width="stretch", **PERSIST)
    if source == "url":
        url = st.text_input(tr("OpenAI-compatible URL", "OpenAI 兼容网址"), LOCAL_SERVER, key="url", **PERSIST)
        key = st.text_input(tr("API key, if needed", "API 密钥（如需要）"), key="api_key", type="password", **PERSIST)
        name = st.text_input(tr("Model name", "模型名"), key="model_name", **PERSIST,
                             placeholder=tr("the first it serves", "服务的第一个模型"))
        try:
            return RemoteModel(url.strip(), key.strip(), name.strip()) if url.strip() else None  # no SDK default
        except Failure as error:
            st.error(str(error), icon=":material/error:")
            return None
    names = list(find_models(parse_args().save_dir))
    name = names and st.selectbox(tr("Weight", "权重"), names, key="weight", label_visibility="collapsed", **PERSIST)
    return local_model(name, "chat") if name else None


def no_weights_yet() -> None:
    """What to do when there is no model yet."""
    folder = parse_args().save_dir
    st.markdown(tr("#### No weights yet", "#### 还没有权重"))
    st.markdown(tr(f"There is no model in `{folder}`. Train a small one in minutes, on two CPU cores:",
                   f"`{folder}` 里还没有模型。用两个 CPU 核心，几分钟就能训练一个小模型："))
    st.code("make demo", language="bash")
    st.markdown(tr("or put published weights there (`full_sft_768.pth`, or a folder in transformers' format). "
                   "This page finds them when it is loaded again.",
                   "或者把公开的权重放进去（`full_sft_768.pth`，或 transformers 格式的文件夹）。刷新页面即可找到。"))


def choose_sampling() -> SamplingParams:
    """Controls for the settings of sampling."""
    limit = st.slider(tr("Longest answer, tokens", "最长回答（token）"), 16, 4096, 512, 16, key="max_new_tokens",
                      **PERSIST)
    temperature = st.slider(tr("Temperature", "温度"), 0.0, 2.0, 0.7, 0.05, key="temperature", **PERSIST,
                            help=tr("0 always takes the likeliest token", "0：总是取最可能的 token"))
    top_p = st.slider("Top p", 0.05, 1.0, 0.95, 0.05, key="top_p", **PERSIST)
    top_k = st.number_input("Top k", 0, 1000, 0, key="top_k", help=tr("0: off", "0：不用"), **PERSIST)
    penalty = st.slider(tr("Repetition penalty", "重复惩罚"), 1.0, 2.0, 1.0, 0.05, key="repetition_penalty", **PERSIST)
    seed = st.number_input(tr("Seed", "随机种子"), 0, 2**31 - 1, None, key="seed", **PERSIST,
                           placeholder=tr("another each time", "每次不同"))
    return SamplingParams(max_new_tokens=limit, temperature=temperature, top_p=top_p, top_k=top_k,
                          repetition_penalty=penalty, seed=time.time_ns() % 2**31 if seed is None else seed)


# -- answers -----------------------------------------------------------------------------------------------------------


class Bubble:
    """An answer on the page: thinking folded, text, a card per tool call, a line of statistics.

    Its elements are fixed and only what changed is sent, so nothing jumps while the answer grows. `has_cards`: from the
    start; a growing answer starts on an empty element, not among the cards of what was there before.
    """

    def __init__(self, has_cards: bool = False):
        self._thinking, self._text = st.empty(), st.empty()
        self._calls = st.container() if has_cards else st.empty()
        self._cards = self._calls if has_cards else None  # made when the first card comes
        with st.container(horizontal=True, vertical_alignment="center"):
            self._stats, self.action = st.empty(), st.empty()  # the action: for a button of the page
        self._status, self._results, self._num_answered = None, [], 0
        self._drawn: dict[str, object] = {}

    def show(self, message: dict, running: bool = False) -> None:
        """Draw the assistant's `message`; `running` while more may come."""
        stats, reasoning = message.get("stats", {}), message.get("reasoning_content") or ""
        calls = message.get("tool_calls", ())
        if reasoning:
            seconds = stats.get("thinking_seconds")
            self._show_thinking(reasoning, running and seconds is None, seconds)
        text = message["content"] or (":gray[…]" if running and not reasoning and not calls else "")
        self._draw("text", text, lambda: self._text.markdown(with_breaks(text)) if text else self._text.empty())
        for call in calls[len(self._results):]:
            with self._card_container().container(border=True, gap="xsmall"):
                values = "  ".join(f":gray[{key}] {code(value)}" for key, value in call["arguments"].items())
                st.markdown(f":material/build: **{call['name']}**&emsp;{values}")
                self._results.append(st.empty())
        for text in stats.get("malformed", ()):
            warning = tr("A tool call that cannot be read: ", "无法读懂的工具调用：") + code(text)
            self._draw(text, warning, lambda warning=warning: self._card_container().warning(
                warning, icon=":material/build:"))
        if not running and not calls:  # with calls, the answer is yet to come
            line = stats_line(stats)
            self._draw("stats", line, lambda: self._stats.caption(line, width="content"))

    def show_result(self, text: str) -> None:
        """Write a tool's result into the next card."""
        if self._num_answered < len(self._results):
            with self._results[self._num_answered].container():
                st.markdown(f":gray[:material/subdirectory_arrow_right:] {code(text)}")
            self._num_answered += 1

    def _show_thinking(self, reasoning: str, running: bool, seconds: float | None) -> None:
        if self._status is None:
            self._status = self._thinking.status("", type="compact", expanded=running)
            self._reasoning = self._status.empty()
        duration = f" · {seconds:.1f} s" if seconds is not None else ""
        label = tr("Thinking…", "思考中…") if running else tr("Thought", "思考过程") + duration
        self._draw("reasoning", reasoning, lambda: self._reasoning.markdown(with_breaks(reasoning)))
        self._draw("label", label, lambda: self._status.update(
            label=label, state="running" if running else "complete", expanded=running))

    def _card_container(self):
        self._cards = self._cards or self._calls.container()
        return self._cards

    def _draw(self, element: str, value: object, draw: Callable[[], object]) -> None:
        """Draw an element, unless it already shows `value`."""
        if self._drawn.get(element) != value:
            self._drawn[element] = value
            draw()


def with_breaks(text: str) -> str:
    """Markdown that keeps the text's line breaks."""
    return text.replace("\n", "  \n")


def code(value: object) -> str:
    """Markdown of the value as code, whatever it contains."""
    text = str(value)
    longest = max(map(len, re.findall("`+", text)), default=0)
    fence = "`" * (longest + 1)
    return f"{fence} {text} {fence}" if longest else f"`{text}`"


def stats_line(stats: dict) -> str:
    """Tokens, speed and how it ended, in one line."""
    parts = [tr(f"{stats['tokens']} tokens", f"{stats['tokens']} 个 token")] if stats.get("tokens") else []
    if stats.get("speed"):
        parts.append(tr(f"{stats['speed']:.0f} tokens/s", f"{stats['speed']:.0f} token/秒"))
    if (wait := stats.get("time_to_first_token")) is not None:
        parts.append(tr(f"first token after {wait:.2f} s", f"首个 {wait:.2f} 秒"))
    reasons = {"length": tr("cut at the longest answer", "到达最长回答"), "cancelled": tr("stopped", "已停止")}
    return " · ".join([*parts, *filter(None, [reasons.get(stats.get("finish_reason"))])])


def stream_replies(replies: list[Reply], bubbles: list[Bubble]) -> None:
    """Draw answers while they are written, until all are done."""
    running = True
    while running:
        running = any(reply.running for reply in replies)
        for reply, bubble in zip(replies, bubbles, strict=True):
            reply.last_watched = time.perf_counter()
            bubble.show(reply.message(), reply.running)
        st.session_state.get("reply")  # lets a click in: Streamlit interrupts a page only where it uses its state
        time.sleep(0.04)
