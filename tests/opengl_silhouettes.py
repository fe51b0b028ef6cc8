"""HalfCheetah's silhouettes by MuJoCo's own OpenGL renderer, in a few demonstrated states, for the frames of
gail_pixels_ae.py to be held to: `python tests/opengl_silhouettes.py [FILE]` writes them, by default to where they are
stored for machines without OpenGL."""

import os
import sys
from pathlib import Path

import numpy as np

STORED = Path(__file__).parent / "opengl_silhouettes.npz"
ROWS = [0, 30, 61, 95]  # of the observations of the default demonstrations
HEIGHT, WIDTH = 168, 288


def silhouettes(obs: np.ndarray) -> np.ndarray:
    """Observations (B, 17) -> (B, H, W) bool: where the animal is."""
    import gymnasium as gym
    import mujoco

    path = Path(gym.__file__).parent / "envs/mujoco/assets/half_cheetah.xml"
    model = mujoco.MjModel.from_xml_path(str(path))
    model.vis.global_.offwidth, model.vis.global_.offheight = WIDTH, HEIGHT
    model.vis.global_.orthographic, model.vis.global_.fovy = 1, 1.3  # metres
    data, camera = mujoco.MjData(model), mujoco.MjvCamera()
    camera.orthographic, camera.distance, camera.azimuth, camera.elevation = 1, 3, 90, 0
    pictures = []
    with mujoco.Renderer(model, HEIGHT, WIDTH) as renderer:
        renderer.enable_segmentation_rendering()
        for row in obs:
            data.qpos[:] = [0, *row[:8]]
            mujoco.mj_forward(model, data)
            camera.lookat[:] = data.subtree_com[1][0], 0, 0.56
            renderer.update_scene(data, camera)
            geoms, kinds = np.moveaxis(renderer.render(), -1, 0)
            pictures.append((kinds == int(mujoco.mjtObj.mjOBJ_GEOM)) & (geoms > 0))  # 0 is the floor
    return np.array(pictures)


if __name__ == "__main__":
    if sys.platform == "linux":
        os.environ.setdefault("MUJOCO_GL", "egl")
    sys.path.insert(0, str(Path(__file__).parent))
    from conftest import DEMOS

    with np.load(DEMOS) as demos:
        file = sys.argv[1] if len(sys.argv) > 1 else STORED
        np.savez_compressed(file, silhouettes=silhouettes(demos["observations"][ROWS]))
