"""The same question to two weights, side by side: what did a stage of training change?"""

import streamlit as st

from model.weights import find_models
from scripts.web import parts
from scripts.web.answers import Reply
from scripts.web.parts import PERSIST, Bubble, tr


def main() -> None:
    st.set_page_config(layout="wide")
    state = st.session_state
    names = list(find_models(parts.parse_args().save_dir))
    if not names:
        parts.no_weights_yet()
        return
    with st.sidebar:
        thinking = st.toggle(tr("Think first", "先思考"), key="thinking", **PERSIST)
        params = parts.choose_sampling()
    models = []
    for side, column in enumerate(st.columns(2, gap="large")):
        with column:
            name = st.selectbox(tr("Weight", "权重"), names, side * (len(names) - 1), key=f"weight_{side}",
                                label_visibility="collapsed", **PERSIST)
            models.append(parts.local_model(name, str(side)))
    ready = None not in models
    st.chat_input(tr("Ask both", "同时问两个模型"), key="typed_for_both", on_submit=send, disabled=not ready)
    if ready and state.pop("pair_pending", False):
        for reply in state.get("pair", ()):
            reply.stop()
        messages = [{"role": "user", "content": state.pair_question}]
        state.pair = [Reply(model.answer(messages, [], thinking, params)) for model in models]
    if "pair" not in state:
        st.caption(tr("Ask below: both answer at once, with the same settings and the same seed.",
                      "在下面提问：两个模型同时回答，设置与随机种子相同。"))
        return
    st.chat_message("user", avatar=":material/person:").markdown(state.pair_question)
    bubbles, columns = [], st.columns(2, gap="large")
    for column in columns:
        with column, st.chat_message("assistant", avatar=":material/spa:"):
            bubbles.append(Bubble())
    parts.stream_replies(state.pair, bubbles)
    for column, reply in zip(columns, state.pair, strict=True):
        if reply.error:
            column.error(reply.error, icon=":material/error:")


def send() -> None:
    """Ask both what was typed."""
    state = st.session_state
    if text := (state.typed_for_both or "").strip():
        state.pair_question, state.pair_pending = text, True


if __name__ == "__main__":
    main()
