"""Films as demonstrations, for `demos.py film`: read videos, or render a set's episodes anew."""

import importlib.util
import re
import warnings
from collections.abc import Iterable
from pathlib import Path

import gymnasium as gym
import imageio
import numpy as np
import torch
import torch.nn.functional as F

VIDEOS = "a folder of .png, a .gif or an .mp4"


def shrink(picture: np.ndarray, image_size: int) -> np.ndarray:
    """A picture (h, w) or (h, w, channels) uint8, or (h, w) bool -> grey (H, W) uint8, by
    averaging, as gail_pixels_ae.py does it: image_size is the shorter side, the other is a multiple
    of 8. An alpha channel is left out. ValueError for other numbers, as of 16 bits."""
    if picture.dtype == bool:
        picture = 255 * picture.astype(np.uint8)
    if picture.dtype != np.uint8:
        raise ValueError(f"a picture's numbers are {picture.dtype}, expected 8 bits a channel")
    if picture.ndim == 3:
        picture = picture[..., : 1 if picture.shape[2] < 3 else 3]
    rows, columns = picture.shape[:2]
    longer = 8 * round(image_size * max(rows, columns) / min(rows, columns) / 8)
    height, width = (image_size, longer) if columns > rows else (longer, image_size)
    grey = torch.from_numpy(np.array(picture, np.float32))
    grey = grey if grey.ndim == 2 else grey.mean(-1)
    return F.adaptive_avg_pool2d(grey[None], (height, width)).round()[0].to(torch.uint8).numpy()


def in_order(file: Path) -> list:
    """What to sort files by, so that 10.png comes after 9.png."""
    return [int(x) if x.isdecimal() else x for x in re.split("([0-9]+)", file.name)]


def read_gif(path: str, picture_ms: float) -> Iterable[np.ndarray]:
    """Who writes a GIF makes one picture of several that are alike, and shows it for longer. Each
    is repeated as often as picture_ms, the time of one, fits its own. A file cannot tell that time:
    it counts in 10 ms, and 33 ms are 30 there, but 20 times as long are 660."""
    with imageio.get_reader(path) as reader:
        pictures = list(reader)
        times = [reader.get_meta_data(i).get("duration") or 0 for i in range(len(pictures))]
    if min(times) == 0:
        print(f"{path}: {len(pictures)} pictures, a step each: it does not tell how long one stays")
        return pictures
    if not picture_ms and len(set(times)) > 1:
        raise ValueError("its pictures stay for different times, since equal ones are merged in a "
                         ".gif; give --picture-ms, the time of one")
    if picture_ms:
        repeats = [max(1, round(time / picture_ms)) for time in times]
        pictures = [x for x, count in zip(pictures, repeats) for _ in range(count)]
        print(f"{path}: {len(times)} pictures make {len(pictures)} of {picture_ms:g} ms")
    return pictures


def read_video(path: str, picture_ms: float) -> Iterable[np.ndarray]:
    """Its pictures, one after the other. ValueError or what imageio raises if it is no video."""
    ending = Path(path).suffix.lower()
    if Path(path).is_dir():
        files = [file for file in Path(path).iterdir() if file.suffix.lower() == ".png"]
        if not files:
            raise ValueError("a folder without .png files")
        yield from (imageio.imread(file) for file in sorted(files, key=in_order))
    elif ending == ".gif":
        yield from read_gif(path, picture_ms)
    elif ending == ".mp4":
        if importlib.util.find_spec("imageio_ffmpeg") is None:
            raise ValueError("an .mp4 needs pip install 'imageio[ffmpeg]'")
        with imageio.get_reader(path) as reader:
            yield from reader
    else:
        raise ValueError(f"expected {VIDEOS}")


def read_videos(paths: list[str], terminated: bool, image_size: int, picture_ms: float) -> dict:
    """Arrays of a set in which each video is an episode."""
    films = []
    for path in paths:
        film = np.array([shrink(picture, image_size) for picture in read_video(path, picture_ms)])
        if len(film) < 2:
            raise ValueError(f"{path}: expected two pictures or more")
        if films and film.shape[1:] != films[0].shape[1:]:
            sizes = f"{film.shape[1:]} and {films[0].shape[1:]}"
            raise ValueError(f"{path}: pictures become {sizes} in size, expected one size")
        films.append(film)
    ends = np.full(len(films), terminated)
    lengths = np.array([len(film) - 1 for film in films], np.int64)
    return {"frames": np.concatenate(films), "lengths": lengths, "terminated": ends,
            "truncated": ~ends}


def render_set(arrays: dict, env_id: str, image_size: int) -> dict:
    """Arrays of a set whose frames are what the environment (MuJoCo's) shows of another set's
    steps. Each step is taken once more from its recorded state: what is rendered after a step lags
    behind the state by a part of it, and must do so here as it does while a policy acts."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about versions that there are
        env = gym.make(env_id, render_mode="rgb_array").unwrapped
    frames, first_state, first_step = [], 0, 0
    for length in arrays["lengths"]:
        env.reset()
        env.set_state(arrays["qpos"][first_state], arrays["qvel"][first_state])
        frames.append(shrink(env.render(), image_size))
        for t in range(length):
            env.set_state(arrays["qpos"][first_state + t], arrays["qvel"][first_state + t])
            env.step(arrays["actions"][first_step + t])
            frames.append(shrink(env.render(), image_size))
        first_state, first_step = first_state + length + 1, first_step + length
    env.close()
    kept = {name: arrays[name] for name in ("lengths", "terminated", "truncated")}
    kept |= {name: arrays[name] for name in ("rewards",) if name in arrays}  # for scores
    return kept | {"frames": np.array(frames)}
