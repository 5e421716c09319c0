"""Chat with a model in the browser; compare two weights; watch a training run. In English and Chinese.

`python scripts/web_demo.py`, or `streamlit run scripts/web_demo.py`.
"""

import sys
from pathlib import Path

if (ROOT := str(Path(__file__).resolve().parents[1])) not in sys.path:  # Streamlit runs this file many times
    sys.path.insert(0, ROOT)

import streamlit as st

from model.errors import run_main
from scripts.web_answers import LocalModel, RemoteModel, Reply
from scripts.web_parts import (
    KEPT,
    Bubble,
    arguments,
    language_choice,
    model_choice,
    no_weights_yet,
    sampling,
    say,
    watch,
)
from trainer.tools import SCHEMAS, run_tool

MAX_CALLS = 8  # rounds of tools after one question


def main() -> None:
    st.set_page_config(page_title="MiniMind", page_icon=":material/spa:", layout="centered")
    state = st.session_state
    with st.sidebar:
        language_choice()
    pages = [st.Page(chat, title=say("Chat", "对话"), icon=":material/chat_bubble:", default=True),
             st.Page(Path(__file__).with_name("web_compare.py"), title=say("Compare", "比较"), url_path="compare",
                     icon=":material/compare_arrows:"),
             st.Page(Path(__file__).with_name("web_curves.py"), title=say("Curves", "曲线"), url_path="curves",
                     icon=":material/show_chart:")]
    state.setdefault("messages", [])
    state.setdefault("reply", None)
    state.setdefault("trouble", None)
    st.navigation(pages, position="top").run()


# -- what the buttons do -----------------------------------------------------------------------------------------------


def end_reply() -> None:
    """Stop the answer that is being written, if any, and keep what was said."""
    state = st.session_state
    if state.reply is not None:
        state.reply.stop()
        keep_reply()


def keep_reply() -> None:
    """Put the finished answer into the conversation; where tools can be computed here, go on with their results."""
    state, message = st.session_state, st.session_state.reply.message()
    state.trouble, state.reply = state.reply.error, None
    if state.trouble is not None or not (message["facts"]["tokens"] or message["content"]):
        return
    state.messages.append(message)
    results = [run_tool(call) for call in message.get("tool_calls", ())]
    if results and None not in results and message["facts"]["reason"] != "cancelled":
        give_results(results, go_on=any(said["role"] == "user" for said in state.messages[-2 * MAX_CALLS:]))


def give_results(results: list[str], go_on: bool = True) -> None:
    state = st.session_state
    state.messages += [{"role": "tool", "content": result} for result in results]
    state.asked = go_on


def send(text: str | None = None) -> None:
    """Ask `text`, or what was typed."""
    text = (text or st.session_state.typed or "").strip()
    if text:
        end_reply()
        st.session_state.messages.append({"role": "user", "content": text})
        st.session_state.asked = True


def send_results(results: list[str | None]) -> None:
    """Give the results of the tools, computed or (None) typed into the card."""
    typed = [st.session_state.get(f"result_{i}", "") for i in range(len(results))]
    give_results([text if result is None else result for result, text in zip(results, typed, strict=True)])


def retry() -> None:
    """Answer the last question again."""
    messages = st.session_state.messages
    while messages[-1]["role"] != "user":
        messages.pop()
    st.session_state.asked = True


def clear() -> None:
    end_reply()
    st.session_state.messages, st.session_state.trouble = [], None


def try_example(text: str, thinking: bool, tools: list[str]) -> None:
    st.session_state.thinking, st.session_state.tools = thinking, tools
    send(text)


# -- the page ----------------------------------------------------------------------------------------------------------


def chat() -> None:
    state = st.session_state
    with st.sidebar:
        model, ask = settings()
    st.chat_input(say("Write a message", "写点什么"), key="typed", on_submit=send, disabled=model is None)
    if model is not None and state.pop("asked", False):
        state.trouble = None
        state.reply = Reply(ask())
    if not state.messages:
        welcome(model)
        return
    bubble = conversation()
    if state.reply is not None:
        watch([state.reply], [bubble])
        keep_reply()
        st.rerun()


def settings() -> tuple[LocalModel | RemoteModel | None, object]:
    """The settings beside the conversation. → the model, and how to ask it for the next message."""
    state = st.session_state
    st.button(say("New conversation", "新对话"), key="clear", icon=":material/edit_square:", on_click=clear,
              width="stretch", disabled=not state.messages)
    model = model_choice()
    chats = model is None or not model.continues_text
    thinking = st.toggle(say("Think first", "先思考"), key="thinking", disabled=not chats, **KEPT)
    tools = st.multiselect(say("Tools it may call", "可以调用的工具"), tuple(SCHEMAS), key="tools", disabled=not chats,
                           placeholder=say("none", "无"), **KEPT)
    system = st.text_area(say("System prompt", "系统提示词"), key="system", height=68, disabled=not chats, **KEPT)
    with st.expander(say("Sampling", "采样"), icon=":material/tune:"):
        how = sampling()
    start = [{"role": "system", "content": system.strip()}] if system.strip() else []
    return model, lambda: model.answer([*start, *state.messages], [SCHEMAS[name] for name in tools], thinking, how)


def welcome(model: LocalModel | RemoteModel | None) -> None:
    """The empty page: what can be asked, or how to get a model."""
    st.space("large")
    if model is None:
        no_weights_yet()
        return
    if model.continues_text:
        st.markdown(say("#### A text to go on with?", "#### 给它一段开头"))
        st.caption(say("A pretrained weight does not chat yet: it continues what you write.",
                       "预训练权重还不会聊天：它会把你写的文字接下去。"))
        starts = say("The colour of|Once upon a time", "墨猫|很久以前").split("|")
        examples = [(":material/edit:", text, False, []) for text in starts]
    else:
        st.markdown(say("#### What shall we talk about?", "#### 聊点什么？"))
        st.caption(say("A small model, trained from scratch. Try one of these:", "从零训练的小模型。试试看："))
        examples = [(":material/waving_hand:", say("What can you do?", "你能做什么？"), False, []),
                    (":material/psychology:", say("Think it over: 6 + 6 + 2?", "想一想，6 + 6 + 2是多少？"), True, []),
                    (":material/build:", say("What is 652 plus 561?", "请计算(179 - 131) * 122。"), False,
                     ["calculate_math"])]
    with st.container(horizontal=True):
        for number, (icon, *example) in enumerate(examples):
            st.button(example[0], key=f"example_{number}", icon=icon, on_click=try_example, args=example)


def conversation() -> Bubble | None:
    """Draw the conversation. → the place of the answer that is being written."""
    state, turn, bubble = st.session_state, None, None
    live = [state.reply.message()] if state.reply else []
    for message in state.messages + live:
        if message["role"] == "user":
            turn = None
            st.chat_message("user", avatar=":material/person:").markdown(message["content"])
        elif message["role"] == "tool":
            bubble.result(message["content"])
        else:
            turn = turn or st.chat_message("assistant", avatar=":material/spa:")
            with turn:
                bubble = Bubble()
                bubble.show(message, running=bool(live) and message is live[0])
    with turn or st.container():
        ending()
    return bubble


def ending() -> None:
    """What stands below the last answer: results a tool must give, a mishap, stop or retry."""
    state, last = st.session_state, st.session_state.messages[-1]
    if state.reply is None and last.get("tool_calls"):
        results = [run_tool(call) for call in last["tool_calls"]]
        with st.form("results", border=False):
            for i, (call, result) in enumerate(zip(last["tool_calls"], results, strict=True)):
                if result is None:
                    st.text_input(say(f"What does {call['name']} say?", f"{call['name']} 的结果是？"),
                                  key=f"result_{i}", placeholder='{"result": …}')
            st.form_submit_button(say("Give the result", "提交结果"), on_click=send_results, args=(results,))
    if state.trouble:
        st.error(state.trouble, icon=":material/error:")
    if state.reply is not None:
        st.button(say("Stop", "停止"), key="stop", icon=":material/stop_circle:", type="tertiary", on_click=end_reply)
    else:
        st.button(say("Retry", "重新回答"), key="retry", icon=":material/refresh:", type="tertiary", on_click=retry)


def launch() -> None:
    """Start Streamlit on this file."""
    from streamlit.web import cli

    options = arguments()
    sys.argv = ["streamlit", "run", __file__, "--server.address", options.host, "--server.port", str(options.port),
                "--", *sys.argv[1:]]
    cli.main()


if __name__ == "__main__":
    if st.runtime.exists():
        main()
    else:
        run_main(launch)
