"""Voice chat: a recording made by espeak-ng, recognised by pocketsphinx, answered by a server."""

import shutil
import subprocess
import sys
import wave
from importlib.util import find_spec
from unittest import mock

import numpy as np
import pytest
from lab import JsonHandler, serving

from model.cli import run_main
from scripts import voice_chat
from scripts.voice_chat import SAMPLE_RATE, SENTENCE, question_in, read_wav


def write_wav(path, samples: np.ndarray, rate: int = SAMPLE_RATE, channels: int = 1, width: int = 2) -> None:
    with wave.open(str(path), "wb") as file:
        file.setparams((channels, width, rate, 0, "NONE", ""))
        file.writeframes((samples * (2**15 - 1)).astype(np.int16).tobytes())


def refused(capsys, *flags: object) -> str:
    with mock.patch.object(sys, "argv", ["voice_chat.py", *map(str, flags)]), pytest.raises(SystemExit) as ended:
        run_main(voice_chat.main)
    lines = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2 and len(lines) == 1
    return lines[0]


def test_recordings_of_any_rate_become_the_same_sound(tmp_path):
    seconds = np.arange(0, 0.5, 1 / SAMPLE_RATE)
    for rate, channels in ((16_000, 1), (44_100, 2), (8_000, 1)):
        times = np.arange(0, 0.5, 1 / rate)
        sound = np.repeat(np.sin(2 * np.pi * 200 * times)[:, None], channels, axis=1)
        write_wav(tmp_path / "a.wav", sound, rate, channels)
        samples = read_wav(tmp_path / "a.wav")
        assert abs(len(samples) - len(seconds)) <= 2
        assert np.abs(samples[:7000] - np.sin(2 * np.pi * 200 * seconds)[:7000]).max() < 0.03


@pytest.mark.parametrize("text, wake_word, question", [
    ("what time is it", "", "what time is it"), ("Hello Mini, what time is it", "hello mini", "what time is it"),
    ("what time is it", "hello mini", ""), ("小智，现在几点", "小智", "现在几点")])
def test_the_question_follows_the_wake_word(text, wake_word, question):
    assert question_in(text, wake_word) == question


def test_sentences_end_where_one_breathes():
    assert SENTENCE.findall("It is 3.5. 你好！Fine\nand so on") == ["It is 3.5.", "你好！", "Fine\n"]
    assert SENTENCE.findall("It is 3.") == []  # while it is written: 3.5 may follow


def test_what_is_missing_is_named(tmp_path, capsys, monkeypatch):
    if not find_spec("pocketsphinx"):
        monkeypatch.setitem(sys.modules, "pocketsphinx", mock.MagicMock())
    wav = tmp_path / "a.wav"
    write_wav(wav, np.zeros(100))
    assert "no such file" in refused(capsys, "--recogniser", "pocketsphinx", "--wav", tmp_path / "absent.wav")
    assert "nothing is spoken" in refused(capsys, "--recogniser", "x", "--out", tmp_path / "b.wav")
    assert "exists already" in refused(capsys, "--recogniser", "x", "--voice", tmp_path, "--out", wav)
    write_wav(tmp_path / "empty.wav", np.zeros(0))
    assert "no sound in it" in refused(capsys, "--recogniser", "pocketsphinx", "--wav", tmp_path / "empty.wav")
    (tmp_path / "text.wav").write_text("no sound")
    assert "not a wav file" in refused(capsys, "--recogniser", "pocketsphinx", "--wav", tmp_path / "text.wav")
    with mock.patch.dict(sys.modules, {"sherpa_onnx": None, "sounddevice": None}):
        assert "pip install sherpa-onnx" in refused(capsys, "--recogniser", tmp_path, "--wav", wav)
        assert "pip install sounddevice" in refused(capsys, "--recogniser", "pocketsphinx")
    with mock.patch.dict(sys.modules, {"sherpa_onnx": mock.MagicMock()}):
        assert "no tokens.txt there" in refused(capsys, "--recogniser", tmp_path, "--wav", wav)
        assert "no *.onnx there" in refused(capsys, "--recogniser", "x", "--voice", tmp_path)


class Answers(JsonHandler):
    asked: list = []

    def do_POST(self):
        body = self.body()
        self.asked.append(body["messages"])
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        for text in ("I am a model. ", "Bye"):
            self.wfile.write(b'data: {"id": "1", "object": "chat.completion.chunk", "created": 0, "model": "m", '
                             b'"choices": [{"index": 0, "delta": {"content": "%s"}}]}\n\n' % text.encode())
        self.wfile.write(b"data: [DONE]\n\n")


@pytest.mark.skipif(not shutil.which("espeak-ng"), reason="no espeak-ng to make a recording")
@pytest.mark.parametrize("wake_word, question", [("", " are you"), ("are", "you"), ("hello", None)])
def test_a_recording_is_recognised_answered_and_spoken(tmp_path, capsys, wake_word, question):
    pytest.importorskip("pocketsphinx")
    wav, spoken = tmp_path / "question.wav", []
    subprocess.run(["espeak-ng", "-v", "en-us", "-s", "140", "-w", wav, "who are you"], check=True)
    Answers.asked = []
    with serving(Answers) as url, mock.patch.object(voice_chat, "make_voice", lambda *_: spoken.append):
        flags = ["--recogniser=pocketsphinx", f"--wav={wav}", f"--base_url={url}", f"--wake_word={wake_word}"]
        with mock.patch.object(sys, "argv", ["voice_chat.py", *flags]):
            run_main(voice_chat.main)
    if question is None:
        assert not Answers.asked and not spoken
        return
    (asked,), = Answers.asked
    assert asked["role"] == "user" and asked["content"].endswith(question)  # the first word is heard now so, now so
    assert capsys.readouterr().out == f"> {asked['content']}\nI am a model. Bye\n"
    assert spoken == ["I am a model.", "Bye"]
