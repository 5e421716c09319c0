"""Open WebUI, from PyPI, as a client of our server, in a real browser. OPEN_WEBUI names its program; else this skips.

    python -m venv webui && webui/bin/pip install open-webui
    OPEN_WEBUI=webui/bin/open-webui pytest tests/test_open_webui.py
"""

import os
import shutil
import socket
import subprocess
import urllib.request

import pytest
from browser import browser, missing
from lab import wait_for
from test_server import WHO, model, serving  # noqa: F401

PROGRAM = os.environ.get("OPEN_WEBUI", "")
SETTINGS = {"WEBUI_AUTH": "False", "OPENAI_API_KEY": "none", "ENABLE_OLLAMA_API": "False", "OFFLINE_MODE": "True",
            "HF_HUB_OFFLINE": "1", "BYPASS_EMBEDDING_AND_RETRIEVAL": "True", "WEBUI_SECRET_KEY": "secret"}


@pytest.mark.skipif(not shutil.which(PROGRAM), reason="OPEN_WEBUI does not name Open WebUI's program")
@pytest.mark.skipif(missing() is not None, reason=missing() or "")
def test_a_chat_is_typed_and_answered(model, tmp_path):  # noqa: F811
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys
    from selenium.webdriver.support.ui import WebDriverWait

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    question, answer = (message["content"] for message in WHO)
    with serving(model, max_tools=0) as served:  # Open WebUI offers 36 tools of its own with every message
        process = subprocess.Popen(
            [PROGRAM, "serve", "--host", "127.0.0.1", "--port", str(port)], stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=os.environ | SETTINGS | {"DATA_DIR": str(tmp_path), "OPENAI_API_BASE_URL": f"{served.url}/v1"})
        try:
            wait_for(lambda: is_healthy(f"http://127.0.0.1:{port}/health"), process)
            with browser() as driver:
                driver.get(f"http://127.0.0.1:{port}/")
                box = WebDriverWait(driver, 120).until(lambda driver: driver.find_element(By.ID, "chat-input"))
                for button in driver.find_elements(By.XPATH, "//button[contains(., 'Okay')]"):  # news of the version
                    button.click()
                box.send_keys(question, Keys.ENTER)
                WebDriverWait(driver, 120).until(
                    lambda driver: answer in driver.find_element(By.TAG_NAME, "body").text)
                driver.save_screenshot(os.environ.get("SCREENSHOT", str(tmp_path / "open_webui.png")))
        finally:
            process.terminate()
            process.wait(60)


def is_healthy(url: str) -> bool:
    try:
        return urllib.request.urlopen(url, timeout=5).status == 200
    except OSError:
        return False
