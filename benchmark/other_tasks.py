"""Tasks that differ from HalfCheetah in what users' tasks differ in, and demonstrations of them:

    python benchmark/other_tasks.py            # writes runs/other_tasks/<name>.npz, in half a minute
    python gail_ppo.py --env-id benchmark.other_tasks:Torque100-v0 --demos runs/other_tasks/Torque100.npz

Pendulum-v1, told in other units: torques a hundred times as large or small, or without bounds, observations a million
times as large or small, or far from 0. MountainCarContinuous-v0 and Acrobot-v1, whose episodes end at a goal;
CartPole-v1, whose episodes end by falling. The demonstrators are short controllers.
"""

import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import gymnasium as gym
import numpy as np
import tyro

FOLDER = Path("runs/other_tasks")


class OtherUnits(gym.Wrapper):
    """Pendulum-v1 with torques times `torque` and observations times `scale` plus `offset`."""

    def __init__(self, env: gym.Env, torque=1.0, scale=1.0, offset=0.0, bounds=True):
        super().__init__(env)
        self.torque, self.scale, self.offset = torque, scale, offset
        limit = 2 * torque if bounds else np.inf
        self.action_space = gym.spaces.Box(-limit, limit, (1,), np.float32)
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, (3,), np.float64)

    def told(self, obs: np.ndarray) -> np.ndarray:
        return self.scale * obs.astype(np.float64) + self.offset

    def reset(self, **options):
        obs, info = self.env.reset(**options)
        return self.told(obs), info

    def step(self, action: np.ndarray):
        torque = np.clip(action.astype(np.float64) / self.torque, -2, 2).astype(np.float32)
        obs, *rest = self.env.step(torque)
        return self.told(obs), *rest


UNITS = {
    "Torque1": {},
    "Torque100": {"torque": 100.0},
    "Torque0p01": {"torque": 0.01},
    "Unbounded": {"bounds": False},
    "Obs1e6": {"scale": 1e6},
    "Obs1e-6": {"scale": 1e-6},
    "Far": {"offset": 1e5},
}


def make_pendulum(render_mode=None, **units) -> gym.Env:
    return OtherUnits(gym.make("Pendulum-v1", max_episode_steps=-1, disable_env_checker=True).unwrapped, **units)


for name, units in UNITS.items():
    gym.register(f"{name}-v0", entry_point=partial(make_pendulum, **units), max_episode_steps=200)


def swing_up(obs: np.ndarray) -> np.ndarray:
    """Torque from (cos, sin, speed): pump energy, and balance once the pendulum is nearly upright."""
    cos, sin, speed = obs
    if cos > 0.85:
        return np.array([np.clip(-18 * np.arctan2(sin, cos) - 4 * speed, -2, 2)], np.float32)
    energy = speed**2 / 6 + 5 * (cos - 1)  # 0 upright and at rest
    direction = np.sign(speed) if abs(speed) > 1e-3 else 1.0
    return np.array([-2 * direction * np.sign(energy + 0.2)], np.float32)


def rock_out(obs: np.ndarray) -> np.ndarray:
    """The car pushes the way it rolls."""
    return np.array([0.95 if obs[1] >= 0 else -0.95], np.float32)


def keep_up(obs: np.ndarray) -> int:
    """The cart pushes the way the pole leans and turns."""
    position, velocity, angle, turning = obs
    return int(angle + 0.5 * turning + 0.05 * position + 0.1 * velocity > 0)


def swing_acrobot(obs: np.ndarray) -> int:
    """Torque the way the second joint turns."""
    return 2 if obs[5] > 0 else 0


def episodes(env: gym.Env, act: Callable, number: int) -> Iterator[dict]:
    for i in range(number):
        obs, _ = env.reset(seed=i)
        observations, actions, rewards, terminated, truncated = [obs], [], [], False, False
        while not (terminated or truncated):
            actions.append(act(obs))
            obs, reward, terminated, truncated, _ = env.step(actions[-1])
            observations.append(obs)
            rewards.append(reward)
        yield {"observations": observations, "actions": actions, "rewards": rewards, "terminated": terminated}


def write(path: Path, env_id: str, limit: int, played: list[dict]) -> None:
    arrays = {name: np.concatenate([x[name] for x in played]) for name in ("observations", "actions", "rewards")}
    arrays["lengths"] = np.array([len(x["rewards"]) for x in played])
    arrays["terminated"] = np.array([x["terminated"] for x in played])
    metadata = json.dumps({"env_id": env_id, "max_episode_steps": limit})
    np.savez(path, truncated=~arrays["terminated"], metadata=metadata, **arrays)


def main() -> None:
    """Write the sets of the other tasks into runs/other_tasks."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    pendulum = list(episodes(gym.make("Pendulum-v1"), swing_up, 50))
    for name, units in UNITS.items():
        env = make_pendulum(**units)
        told = [x | {"observations": env.told(np.array(x["observations"]))} for x in pendulum]
        told = [x | {"actions": env.torque * np.array(x["actions"])} for x in told]
        write(FOLDER / f"{name}.npz", f"benchmark.other_tasks:{name}-v0", 200, told)
    for env_id, act, number in (
        ("MountainCarContinuous-v0", rock_out, 50),
        ("CartPole-v1", keep_up, 10),
        ("Acrobot-v1", swing_acrobot, 10),
    ):
        env = gym.make(env_id)
        write(FOLDER / f"{env_id}.npz", env_id, env.spec.max_episode_steps, list(episodes(env, act, number)))


if __name__ == "__main__":
    tyro.cli(main)
