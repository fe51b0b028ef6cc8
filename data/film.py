"""Films as demonstrations, for `demos.py film`: read videos, or render a set's episodes anew."""

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
    """A picture (h, w), (h, w, 3) or (h, w, 4) uint8 -> grey (H, W) uint8, by averaging, as
    gail_pixels_ae.py does it: image_size is the shorter side, the other is a multiple of 8."""
    rows, columns = picture.shape[:2]
    longer = 8 * round(image_size * max(rows, columns) / min(rows, columns) / 8)
    height, width = (image_size, longer) if columns > rows else (longer, image_size)
    grey = torch.from_numpy(np.array(picture, np.float32))
    grey = grey if grey.ndim == 2 else grey[..., :3].mean(-1)
    return F.adaptive_avg_pool2d(grey[None], (height, width)).round()[0].to(torch.uint8).numpy()


def read_video(path: str) -> Iterable[np.ndarray]:
    """Its pictures, one after the other. ValueError or what imageio raises if it is no video."""
    if Path(path).is_dir():
        files = sorted(Path(path).glob("*.png"))
        if not files:
            raise ValueError("a folder without .png files")
        yield from (imageio.imread(file) for file in files)
    elif Path(path).suffix in (".gif", ".mp4"):
        with imageio.get_reader(path) as reader:
            yield from reader
    else:
        raise ValueError(f"expected {VIDEOS}")


def read_videos(paths: list[str], terminated: bool, image_size: int) -> dict:
    """Arrays of a set in which each video is an episode."""
    films = []
    for path in paths:
        try:
            film = np.array([shrink(picture, image_size) for picture in read_video(path)])
        except ImportError as error:
            raise ValueError(f"{path}: {error}; for .mp4, pip install 'imageio[ffmpeg]'") from None
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
