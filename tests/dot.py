"""A world of pictures for test_films.py: a dot on a line that is to be pushed to the right."""

import gymnasium as gym
import numpy as np


class Dot(gym.Env):
    metadata = {"render_modes": ["rgb_array"], "render_fps": 20}
    observation_space = gym.spaces.Box(-np.inf, np.inf, (2,), np.float64)
    action_space = gym.spaces.Box(np.float32([-2.0]), np.float32([6.0]))

    def __init__(self, render_mode=None, size=(32, 56)):
        self.render_mode, self.size = render_mode, size

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.x = self.np_random.uniform(0.1, 0.5)
        return np.array([self.x, 0.0]), {}

    def step(self, action):
        self.x = float(np.clip(self.x + 0.02 * action[0], 0, 1))
        return np.array([self.x, action[0]]), self.x, self.x > 0.95, False, {}

    def render(self):
        height, width = self.size
        picture = np.zeros((height, width, 3), np.uint8)
        column = int(self.x * (width - 9))
        picture[height // 2 - 4 : height // 2 + 4, column : column + 8] = [90, 150, 240]
        return picture


gym.register("Dot-v0", Dot)
gym.register("BlindDot-v0", lambda: Dot())


class Moves(Dot):
    action_space = gym.spaces.Discrete(2)


gym.register("Moves-v0", Moves)


class Grey(Dot):
    def render(self):
        return super().render().mean(-1).round().astype(np.uint8)


gym.register("Grey-v0", Grey)


def film(episodes: int, steps: int, size=(32, 56)) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Frames (L + E, h, w, 3), lengths and terminated (E,) of a demonstrator that pushes to the right."""
    env, frames, lengths, ends = Dot("rgb_array", size), [], [], []
    for seed in range(episodes):
        env.reset(seed=seed)
        frames.append(env.render())
        length, terminated = 0, False
        while length < steps and not terminated:
            _, _, terminated, _, _ = env.step(np.array([1.0 + seed / 2]))
            frames.append(env.render())
            length += 1
        lengths.append(length)
        ends.append(terminated)
    return np.array(frames), np.array(lengths), np.array(ends)
