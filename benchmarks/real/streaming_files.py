"""Calibration data for real streaming models of ONNX, as `convert --calibration` takes it.

    python benchmarks/real/streaming_files.py clips OUT.npz FOLDER
    python benchmarks/real/streaming_files.py windows OUT.npz FOLDER
    python benchmarks/real/streaming_files.py rate OUT.npz FOLDER

The models tell speech from anything else, 32 ms at a time, with the states of an LSTM of 128 in and out. `clips`: for
`faster_whisper/assets/silero_vad_v6.onnx` of faster-whisper 1.2.1, which takes the windows of a clip in one call.
`windows`: for `silero_vad/data/silero_vad_openvino_16k.onnx` of silero-vad 6.2.3, one window a call, both states in one
array. `rate`: for its `silero_vad.onnx`, which is told the sampling rate and has an LSTM in branches of an If for each.

FOLDER holds what Debian's packages of Asterisk unpack to (`dpkg -x`): asterisk-core-sounds-{en,es,fr,it,ru}-wav 1.6.1,
spoken prompts, and asterisk-moh-opsound-wav 2.03, five pieces of music. Prompts with pauses between them are mixed
with music; `speech` says in which windows the prompt alone is loud. All is recorded at 8 kHz and brought to 16.

Of `OUT.npz` the first three quarters calibrate: four voices of four languages, four pieces. The last is measured on:
another voice, in Russian, over the fifth piece.
"""

from __future__ import annotations

import sys
import wave
from pathlib import Path

import numpy as np
from scipy.signal import resample_poly

COUNT, WINDOWS = 256, 96

WINDOW, CONTEXT = 512, 64
"""Samples at 16 kHz: of a window, and of the one before it that stand in front of it."""

VOICES = ("en_US", "es_MX", "fr_CA", "it_IT")
APART = "ru_RU"

LOUD = 0.06
"""Of the loudness of a clip's loud windows: what is louder counts as speech."""


def sound(file: Path) -> np.ndarray:
    """What a file at 8 kHz holds, between -1 and 1."""
    with wave.open(str(file)) as opened:
        if (opened.getframerate(), opened.getnchannels(), opened.getsampwidth()) != (8000, 1, 2):
            raise SystemExit(f"{file} is not of 8 kHz, one channel and 16 bits.")
        return np.frombuffer(opened.readframes(opened.getnframes()), "<i2").astype(np.float32) / 32768


def clip(draw: np.random.Generator, prompts: list[Path], piece: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Windows with what stands before them (windows, 576), and which of them are speech (windows,)."""
    length = WINDOWS * WINDOW // 2
    spoken = np.zeros(length, np.float32)
    at = int(draw.integers(0, 8000))
    while at < length:
        words = sound(prompts[draw.integers(len(prompts))])[: length - at]
        spoken[at : at + len(words)] = words
        at += len(words) + int(draw.integers(1600, 12000))
    start = draw.integers(len(piece) - length)
    music = piece[start : start + length]
    loudness = np.sqrt(np.square(spoken.reshape(WINDOWS, -1)).mean(1))
    loud = np.quantile(loudness, 0.9)
    # Music at 5 to 25 dB below speech.
    level = loud * 10 ** -draw.uniform(0.25, 1.25) / max(float(np.sqrt(np.square(music).mean())), 1e-6)
    mixed = resample_poly(spoken + level * music, 2, 1).astype(np.float32).clip(-1, 1)
    before = np.concatenate([np.zeros(CONTEXT, np.float32), mixed])
    windows = np.stack([before[k * WINDOW : (k + 1) * WINDOW + CONTEXT] for k in range(WINDOWS)])
    return windows, (loudness > LOUD * loud).astype(np.float32)


def clips(folder: Path) -> dict[str, np.ndarray]:
    """Clips (samples, windows, 576), those of the voice apart last, and what is speech (samples, windows)."""
    draw = np.random.default_rng(0)
    pieces = [sound(file) for file in sorted(folder.rglob("moh/*.wav"))]
    prompts = {
        voice: sorted(f for f in folder.rglob(f"sounds/{voice}*/*.wav") if f.stat().st_size > 8000)
        for voice in (*VOICES, APART)
    }
    if len(pieces) < 2 or not all(prompts.values()):
        raise SystemExit(f"{folder} lacks music or prompts; see the head of {__file__}.")
    made = []
    for k in range(COUNT):
        seen = k < COUNT * 3 // 4
        voice = VOICES[k % len(VOICES)] if seen else APART
        made.append(clip(draw, prompts[voice], pieces[k // 4 % (len(pieces) - 1)] if seen else pieces[-1]))
    windows, speech = (np.stack([one[i] for one in made]) for i in (0, 1))
    return {"input": windows, "speech": speech}


def main() -> None:
    """Write the samples."""
    made = clips(Path(sys.argv[3]))
    # One call a clip, or one call a window.
    calls = (1, WINDOWS) if sys.argv[1] == "clips" else (WINDOWS,)
    more = {"sr": np.array(16000)} if sys.argv[1] == "rate" else {}
    np.savez(sys.argv[2], input=made["input"].reshape(COUNT, *calls, -1), speech=made["speech"], **more)


if __name__ == "__main__":
    main()
