"""Talk to a model: speech is recognised, the server answers, the answer is spoken.

    pip install sherpa-onnx sounddevice                # and download models: docs/serving.md
    python scripts/serve_openai_api.py                 # in another terminal
    python scripts/voice_chat.py --recogniser DIR --voice DIR --wake_word 小智      # microphone and loudspeaker
    python scripts/voice_chat.py --recogniser DIR --wav question.wav --voice DIR --out answer.wav
    python scripts/voice_chat.py --recogniser pocketsphinx --wav question.wav       # English; its package has a model

1. Audio comes in pieces of 0.1 s, at 16 kHz, from the microphone or from a file.
2. The recogniser gives the text of each utterance, which a pause ends.
3. What follows the wake word is the question; utterances without it are ignored.
4. The answer is printed while it is written, and spoken sentence by sentence.
"""

import argparse
import re
import sys
import wave
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType

import numpy as np

sys.path[0] = str(Path(__file__).resolve().parents[1])  # the repository, not this folder

from model.cli import Parser, UserError, run_main
from scripts.lib.openai_client import ChatClient, add_endpoint_args
from scripts.lib.terminal import AnswerPrinter

SAMPLE_RATE = 16_000
PIECE = SAMPLE_RATE // 10  # samples
SENTENCE = re.compile(r"(.+?(?:[。！？!?\n]|\.(?=\s)))\s*", re.S)
Speak = Callable[[str], None]


def require(package: str, purpose: str) -> ModuleType:
    try:
        return import_module(package)
    except (ImportError, OSError) as error:  # OSError: sounddevice without PortAudio
        raise UserError(f"{purpose} needs {package.replace('_', '-')} ({error}): "
                        f"pip install {package.replace('_', '-')}") from None


def model_file(folder: Path, pattern: str, flag: str) -> str:
    """The file of a model's folder that fits `pattern`, quantised (int8) if there is a choice. Raises UserError."""
    files = sorted(folder.glob(pattern), key=lambda path: ("int8" not in path.name, path.name))
    if not files:
        raise UserError(f"{flag} {folder}: no {pattern} there; docs/serving.md says where models are")
    return str(files[0])


# -- audio in ----------------------------------------------------------------------------------------------------------


def read_wav(path: Path) -> np.ndarray:
    """The samples of a wav file, -1 to 1, at 16 kHz, all channels mixed. Raises UserError when it cannot be read."""
    try:
        with wave.open(str(path)) as file:
            channels, width, rate, frames, *_ = file.getparams()
            samples = np.frombuffer(file.readframes(frames), np.int16).reshape(-1, channels).mean(1) / 2**15
    except FileNotFoundError:
        raise UserError(f"--wav {path}: no such file") from None
    except (wave.Error, EOFError, ValueError) as error:
        raise UserError(f"--wav {path}: not a wav file of 16 bits: {error}") from None
    if width != 2:
        raise UserError(f"--wav {path}: {8 * width} bits per sample; save it with 16")
    if not len(samples):
        raise UserError(f"--wav {path}: no sound in it")
    positions = np.arange(0, len(samples), rate / SAMPLE_RATE)
    return np.interp(positions, np.arange(len(samples)), samples).astype(np.float32)


def wav_pieces(path: Path) -> Iterator[np.ndarray]:
    samples = np.concatenate((read_wav(path), np.zeros(2 * SAMPLE_RATE, np.float32)))  # a pause ends the utterance
    yield from np.array_split(samples, max(1, len(samples) // PIECE))


def microphone_pieces() -> Iterator[np.ndarray]:
    sounddevice = require("sounddevice", "the microphone")
    try:
        with sounddevice.InputStream(samplerate=SAMPLE_RATE, channels=1, dtype="float32") as stream:
            while True:
                yield stream.read(PIECE)[0][:, 0]
    except sounddevice.PortAudioError as error:
        raise UserError(f"no microphone ({error}); --wav FILE reads a recording") from None


# -- recognition -------------------------------------------------------------------------------------------------------


def recognise(pieces: Iterator[np.ndarray], recogniser: str) -> Iterator[str]:
    """The text of each utterance that has one. `recogniser`: a folder of a sherpa-onnx model, or "pocketsphinx"."""
    utterances = pocketsphinx_texts(pieces) if recogniser == "pocketsphinx" else sherpa_texts(pieces, Path(recogniser))
    return (text for text in map(str.strip, utterances) if text)


def pocketsphinx_texts(pieces: Iterator[np.ndarray]) -> Iterator[str]:
    pocketsphinx = require("pocketsphinx", "--recogniser pocketsphinx")
    decoder = pocketsphinx.Decoder(samprate=SAMPLE_RATE, loglevel="FATAL")
    endpointer = pocketsphinx.Endpointer(sample_rate=SAMPLE_RATE)
    buffer, listening = b"", False
    for piece in pieces:
        buffer += (piece * (2**15 - 1)).astype(np.int16).tobytes()
        while len(buffer) >= endpointer.frame_bytes:
            frame, buffer = buffer[:endpointer.frame_bytes], buffer[endpointer.frame_bytes:]
            speech = endpointer.process(frame)
            if speech is None:
                continue
            if not listening:
                decoder.start_utt()
            decoder.process_raw(speech)
            listening = endpointer.in_speech
            if not listening:
                decoder.end_utt()
                yield decoder.hyp().hypstr if decoder.hyp() else ""


def sherpa_texts(pieces: Iterator[np.ndarray], folder: Path) -> Iterator[str]:
    """By a streaming model: a transducer (encoder, decoder, joiner) or a paraformer (encoder, decoder)."""
    sherpa = require("sherpa_onnx", "--recogniser")
    files = {name: model_file(folder, pattern, "--recogniser") for name, pattern in (
        ("tokens", "tokens.txt"), ("encoder", "*encoder*.onnx"), ("decoder", "*decoder*.onnx"))}
    if joiner := sorted(folder.glob("*joiner*.onnx")):
        recogniser = sherpa.OnlineRecognizer.from_transducer(**files, joiner=str(joiner[0]),
                                                             enable_endpoint_detection=True)
    else:
        recogniser = sherpa.OnlineRecognizer.from_paraformer(**files, enable_endpoint_detection=True)
    stream = recogniser.create_stream()
    for piece in pieces:
        stream.accept_waveform(SAMPLE_RATE, piece)
        while recogniser.is_ready(stream):
            recogniser.decode_stream(stream)
        if recogniser.is_endpoint(stream):
            yield recogniser.get_result(stream)
            recogniser.reset(stream)


def question_in(text: str, wake_word: str) -> str:
    """What follows the wake word, "" where it is not said; all of it where there is none."""
    match = re.search(re.escape(wake_word), text, re.IGNORECASE)
    return text[match.end():].strip(" ,.，。") if match else ""


# -- speech out --------------------------------------------------------------------------------------------------------


def make_voice(folder: Path | None, out: Path | None) -> Speak:
    """What speaks a sentence, by a VITS model of sherpa-onnx: to the loudspeaker, or appended to the file `out`."""
    if folder is None:
        return lambda sentence: None
    sherpa = require("sherpa_onnx", "--voice")
    data, lexicon = folder / "espeak-ng-data", folder / "lexicon.txt"
    vits = sherpa.OfflineTtsVitsModelConfig(
        model=model_file(folder, "*.onnx", "--voice"), tokens=model_file(folder, "tokens.txt", "--voice"),
        lexicon=str(lexicon) if lexicon.is_file() else "", data_dir=str(data) if data.is_dir() else "")
    voice = sherpa.OfflineTts(sherpa.OfflineTtsConfig(model=sherpa.OfflineTtsModelConfig(vits=vits)))
    if out is None:
        sounddevice = require("sounddevice", "the loudspeaker")

        def speak(sentence: str) -> None:
            audio = voice.generate(sentence)
            sounddevice.play(audio.samples, audio.sample_rate, blocking=True)
    else:
        spoken: list[float] = []

        def speak(sentence: str) -> None:
            audio = voice.generate(sentence)
            spoken.extend(audio.samples)
            sherpa.write_wave(str(out), spoken, audio.sample_rate)
    return speak


def answer(client: ChatClient, messages: list[dict], speak: Speak) -> str:
    """Print the answer to `messages` while it is written, and speak each sentence when it is complete. → the answer"""
    text, unspoken, print_event = "", "", AnswerPrinter()
    for kind, value in client.stream(messages):
        if kind == "content":
            print_event(kind, value)
            text, unspoken = text + value, unspoken + value
            while sentence := SENTENCE.match(unspoken):
                unspoken = unspoken[sentence.end():]
                speak(sentence[1].strip())
    if unspoken.strip():
        speak(unspoken.strip())
    print()
    return text


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recogniser", required=True, metavar="DIR",
                        help="folder of a streaming sherpa-onnx model, or 'pocketsphinx'")
    parser.add_argument("--voice", type=Path, metavar="DIR",
                        help="folder of a VITS model of sherpa-onnx (none: text only)")
    parser.add_argument("--wake_word", default="", help="answer only what follows this word (none: everything)")
    parser.add_argument("--wav", type=Path, help="read this recording instead of the microphone")
    parser.add_argument("--out", type=Path, help="write the spoken answers to this wav file")
    add_endpoint_args(parser, "MINIMIND_API_KEY")
    args = parser.parse_args()
    if args.out and not args.voice:
        raise UserError(f"--out {args.out}: nothing is spoken without --voice DIR")
    if args.out and args.out.exists():
        raise UserError(f"--out {args.out}: exists already; remove it or name another file")
    speak, client = make_voice(args.voice, args.out), ChatClient(args.base_url, args.api_key, args.model)
    pieces, messages = wav_pieces(args.wav) if args.wav else microphone_pieces(), []
    for text in recognise(pieces, args.recogniser):
        if question := question_in(text, args.wake_word):
            print(f"> {question}")
            messages.append({"role": "user", "content": question})
            messages.append({"role": "assistant", "content": answer(client, messages, speak)})


if __name__ == "__main__":
    run_main(main)
