"""The page of the web demo to chat on: several turns, thinking folded, tool calls as cards, stop and retry."""

import itertools
import json
from collections.abc import Callable

import streamlit as st

from model.weights import find_models
from scripts.web import parts
from scripts.web.answers import LocalModel, RemoteModel, Reply
from scripts.web.parts import PERSIST, Bubble, tr
from trainer.rl.builtin_tools import MOCKED
from trainer.rl.tools import SCHEMAS, TOOLS, call_tool

MAX_ROUNDS = 8  # of tool calls after one question
NUM_STALE = 24  # elements below a growing answer that are taken off the page


def main() -> None:
    st.set_page_config(layout="centered")
    state = st.session_state
    state.setdefault("messages", [])
    state.setdefault("reply", None)  # the answer that is being written
    state.setdefault("error", None)  # of the last answer
    with st.sidebar:
        model, ask = settings()
    st.chat_input(tr("Write a message", "写点什么"), key="typed", on_submit=send, disabled=model is None)
    if model is not None and state.pop("pending", False):
        state.error, state.reply = None, Reply(ask())
    greeting = st.empty()  # an element of its own: the conversation would leave parts of it on the page for a while
    if not state.messages:
        with greeting.container():
            welcome(model)
        return
    greeting.empty()
    bubble = conversation()
    if state.reply is not None:
        parts.stream_replies([state.reply], [bubble])
        keep_reply()
        st.rerun()


# -- what the buttons do -----------------------------------------------------------------------------------------------


def end_reply() -> None:
    """Stop the answer that is being written, if any, and keep its text so far."""
    if st.session_state.reply is not None:
        st.session_state.reply.stop()
        keep_reply()


def keep_reply() -> None:
    """Put the finished answer into the conversation; where its tools can run here, go on with their results."""
    state, reply = st.session_state, st.session_state.reply
    message, state.error, state.reply = reply.message(), reply.error, None
    if message["stats"]["tokens"]:
        state.messages.append(message)
    results = [run_tool(call) for call in message.get("tool_calls", ())]
    if results and None not in results and reply.reason not in (None, "cancelled"):
        give_results(results)


def run_tool(call: dict) -> str | None:
    """The result of {"name", "arguments"} as JSON text; None where it would be invented, or the tool is not here."""
    if call["name"] not in TOOLS or call["name"] in MOCKED:
        return None
    return json.dumps(call_tool(call["name"], call["arguments"]), ensure_ascii=False)


def give_results(results: list[str]) -> None:
    """Append the tools' results, and ask for the next message, but not for ever."""
    state = st.session_state
    state.messages += [{"role": "tool", "content": result} for result in results]
    since_question = itertools.takewhile(lambda message: message["role"] != "user", reversed(state.messages))
    state.pending = sum(message["role"] == "assistant" for message in since_question) < MAX_ROUNDS


def send(text: str | None = None) -> None:
    """Ask `text`, or what was typed."""
    if text := (text or st.session_state.typed or "").strip():
        end_reply()
        st.session_state.messages.append({"role": "user", "content": text})
        st.session_state.pending = True


def send_results(results: list[str | None]) -> None:
    """Give the results of the tools, computed or (None) typed into the card."""
    state = st.session_state
    results = [state[f"result_{i}"].strip() if result is None else result for i, result in enumerate(results)]
    if all(results):
        give_results(results)
    else:
        state.error = tr("Write the tool's result first.", "请先写下工具的结果。")


def retry() -> None:
    """Answer the last question again."""
    messages = st.session_state.messages
    while messages[-1]["role"] != "user":
        messages.pop()
    st.session_state.pending = True


def clear() -> None:
    end_reply()
    st.session_state.messages, st.session_state.error = [], None


def try_example(text: str, thinking: bool, tools: list[str]) -> None:
    st.session_state.thinking, st.session_state.tools = thinking, tools
    send(text)


# -- the page ----------------------------------------------------------------------------------------------------------


def settings() -> tuple[LocalModel | RemoteModel | None, Callable]:
    """The settings beside the conversation. → the model, and a function that asks it for the next message"""
    state = st.session_state
    st.button(tr("New conversation", "新对话"), key="clear", icon=":material/edit_square:", on_click=clear,
              width="stretch", disabled=not state.messages)
    model = parts.choose_model()
    disabled = model is not None and model.continues_text
    thinking = st.toggle(tr("Think first", "先思考"), key="thinking", disabled=disabled, **PERSIST)
    tools = st.multiselect(tr("Tools it may call", "可以调用的工具"), tuple(SCHEMAS), key="tools", disabled=disabled,
                           placeholder=tr("none", "无"), **PERSIST)
    system = st.text_area(tr("System prompt", "系统提示词"), key="system", height=68, disabled=disabled, **PERSIST)
    with st.expander(tr("Sampling", "采样"), icon=":material/tune:"):
        params = parts.choose_sampling()
    start = [{"role": "system", "content": system.strip()}] if system.strip() else []
    return model, lambda: model.answer([*start, *state.messages], [SCHEMAS[name] for name in tools], thinking, params)


def welcome(model: LocalModel | RemoteModel | None) -> None:
    """The empty page: examples of questions, or how to get a model."""
    st.space("large")
    if model is None:
        if st.session_state.source == "local" and not find_models(parts.parse_args().save_dir):
            parts.no_weights_yet()
        return
    if model.continues_text:
        st.markdown(tr("#### A text to go on with?", "#### 给它一段开头"))
        st.caption(tr("A pretrained weight does not chat yet: it continues what you write.",
                      "预训练权重还不会聊天：它会把你写的文字接下去。"))
        starts = tr("The colour of|Once upon a time", "墨猫|很久以前").split("|")
        examples = [(":material/edit:", text, False, []) for text in starts]
    else:
        st.markdown(tr("#### What shall we talk about?", "#### 聊点什么？"))
        st.caption(tr("A small model, trained from scratch. Try one of these:", "从零训练的小模型。试试看："))
        examples = [(":material/waving_hand:", tr("What can you do?", "你能做什么？"), False, []),
                    (":material/psychology:", tr("Think it over: 6 + 6 + 2?", "想一想，6 + 6 + 2是多少？"), True, []),
                    (":material/build:", tr("What is 652 plus 561?", "请计算(179 - 131) * 122。"), False,
                     ["calculate_math"])]
    with st.container(horizontal=True):
        for number, (icon, *example) in enumerate(examples):
            st.button(example[0], key=f"example_{number}", icon=icon, on_click=try_example, args=example)


def conversation() -> Bubble | None:
    """Draw the conversation. → the bubble of the answer that is being written, or of the last one"""
    state, turn, bubble = st.session_state, None, None
    live = [state.reply.message()] if state.reply else []
    for message in state.messages + live:
        if message["role"] == "user":
            turn = None
            st.chat_message("user", avatar=":material/person:").markdown(parts.with_breaks(message["content"]))
        elif message["role"] == "tool":
            bubble.show_result(message["content"])
        else:
            turn = turn or st.chat_message("assistant", avatar=":material/spa:")
            with turn:
                bubble = Bubble(has_cards=bool(message.get("tool_calls")))
                bubble.show(message, running=bool(live) and message is live[0])
    with turn or st.container():
        footer(bubble)
        for _ in range(NUM_STALE if live else 0):  # what a longer answer before a retry left there
            st.empty()
    return bubble


def footer(bubble: Bubble | None) -> None:
    """Below the last answer: results that a tool must give, an error, stop or retry."""
    state, calls = st.session_state, st.session_state.messages[-1].get("tool_calls")
    if state.reply is None and calls:
        results = [run_tool(call) for call in calls]
        with st.form("results", border=False):
            for i, (call, result) in enumerate(zip(calls, results, strict=True)):
                if result is None:
                    st.text_input(tr(f"What does {call['name']} return?", f"{call['name']} 的结果是？"),
                                  key=f"result_{i}", placeholder='{"result": …}')
            st.form_submit_button(tr("Give the result", "提交结果"), on_click=send_results, args=(results,))
    if state.error:
        st.error(state.error, icon=":material/error:")
    button = (bubble.action if bubble else st).button
    if state.reply is not None:
        button(tr("Stop", "停止"), key="stop", icon=":material/stop_circle:", type="tertiary", on_click=end_reply)
    else:
        button(tr("Retry", "重新回答"), key="retry", icon=":material/refresh:", type="tertiary", on_click=retry)


if __name__ == "__main__":
    main()
