"""Chat with a model in the browser; compare two weights; watch a training run. In English and Chinese.

`python scripts/web_demo.py`, or `streamlit run scripts/web_demo.py`.
"""

import sys
from pathlib import Path

if (ROOT := str(Path(__file__).resolve().parents[1])) not in sys.path:  # Streamlit runs this file many times
    sys.path.insert(0, ROOT)

import streamlit as st

from model.cli import run_main
from scripts.web.parts import parse_args, sidebar_header, tr


def main() -> None:
    """The sidebar and the navigation, which every page has."""
    st.set_page_config(page_title="MiniMind", page_icon="🌱")
    with st.sidebar:
        sidebar_header()
    here = Path(__file__).parent
    st.navigation([
        st.Page(here / "web" / "chat.py", title=tr("Chat", "对话"), icon=":material/chat_bubble:", default=True),
        st.Page(here / "web" / "compare.py", title=tr("Compare", "比较"), icon=":material/compare_arrows:",
                url_path="compare"),
        st.Page(here / "web" / "curves.py", title=tr("Curves", "曲线"), icon=":material/show_chart:",
                url_path="curves"),
    ], position="top").run()


def launch() -> None:
    """Start Streamlit on this file."""
    from streamlit.web import cli

    args = parse_args()
    sys.argv = ["streamlit", "run", __file__, "--server.address", args.host, "--server.port", str(args.port),
                "--", *sys.argv[1:]]
    cli.main()


if __name__ == "__main__":
    if st.runtime.exists():
        main()
    else:
        run_main(launch)
