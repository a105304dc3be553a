"""Write the two datasets of docs/tutorial_dataset.md: `python examples/write_tutorial_data.py data`.

A simulated arm with six joints and a gripper moves to a block and closes the gripper; the second dataset has two such
arms. The images are drawn, not rendered: a block, and the hand where two of the joints put it. A policy can learn the
task, and the numbers behave like a robot's: joints in radians, a gripper between 0 and 1, actions that are positions.
"""

import os
import shutil
import sys
from pathlib import Path

os.environ.setdefault("SVT_LOG", "1")  # The video encoder reports errors only.

import numpy as np
from lerobot.datasets.lerobot_dataset import LeRobotDataset

FPS = 15
HOME = np.array([0.0, -0.4, 0.2, -1.6, 0.0, 1.3, 0.0])  # Six joints in radians, and the open gripper.
JOINTS = [*(f"joint_{number}" for number in range(1, 7)), "gripper"]
COLORS = {"red": (210, 50, 40), "green": (50, 160, 70), "blue": (50, 90, 200)}
HEIGHT, WIDTH = 96, 128


def names_of(arms):
    """A name for each number of the state and the action: with two arms, which one it belongs to."""
    return [name if arm is None else f"{arm}_{name}" for arm in arms for name in JOINTS]


def reach(generator, frames):
    """Positions [frames + 1, 7] on the way to a block, and where the block is, as two numbers between -1 and 1."""
    block = generator.uniform(-1, 1, 2)
    goal = HOME + np.array([0.8 * block[0], 0.5 * block[1], 0.3 * block[1], 0.4, 0.2 * block[0], 0.3, 0.0])
    time = np.clip(np.linspace(0, 1.3, frames + 1), 0, 1)[:, np.newaxis]
    path = HOME + (goal - HOME) * (10 * time**3 - 15 * time**4 + 6 * time**5)  # Starts and ends at rest.
    path[:, 6] = np.clip(np.linspace(0, 1.3, frames + 1) * 5 - 5, 0, 1)  # Closes once the hand is there.
    return path + generator.normal(scale=0.002, size=path.shape) * (np.arange(7) < 6), block


def draw(spots):
    """An image [HEIGHT, WIDTH, 3] with squares: (x, y, half a side in pixels, color), x and y from -1 to 1."""
    image = np.full((HEIGHT, WIDTH, 3), (190, 180, 165), np.uint8)
    for x, y, side, color in spots:
        row, column = int((y + 1.5) / 3 * HEIGHT), int((x + 1.5) / 3 * WIDTH)
        image[max(0, row - side) : row + side, max(0, column - side) : column + side] = color
    return image


def hand(position):
    """Where a hand is in the image: the joints that turn and lift the arm."""
    return position[0] / 0.8, (position[1] - HOME[1]) / 0.5


def write(root, arms, cameras, episodes=8, frames=45, seed=0):
    """Write a dataset.

    Args:
        root: Folder to write; an earlier one is replaced.
        arms: A name for each arm; `[None]` is a single one.
        cameras: The scene's camera, then one for each arm's wrist.
        episodes: Number of episodes; they take turns with three tasks.
        frames: Frames of each episode.
        seed: Seed of the blocks' places.
    """
    generator, names = np.random.default_rng(seed), names_of(arms)
    numbers = {"dtype": "float32", "shape": (len(names),), "names": names}
    picture = {"dtype": "video", "shape": (HEIGHT, WIDTH, 3), "names": ["height", "width", "channels"]}
    features = {f"observation.images.{camera}": picture for camera in cameras}
    features |= {"observation.state": numbers, "action": numbers}
    shutil.rmtree(root, ignore_errors=True)
    dataset = LeRobotDataset.create(f"tutorial/{Path(root).name}", FPS, features, root=root, robot_type="simulated")
    for episode in range(episodes):
        color = list(COLORS)[episode % 3]
        paths, blocks = zip(*(reach(generator, frames) for _ in arms), strict=True)
        for t in range(frames):
            scene = [(*block, 7, COLORS[color]) for block in blocks]
            scene += [(*hand(path[t]), 4, (40, 40, 40)) for path in paths]
            images = [draw(scene)]
            for path, block in zip(paths, blocks, strict=True):  # The wrist sees the block relative to the hand.
                images.append(draw([(*(block - np.array(hand(path[t]))), 18, COLORS[color])]))
            dataset.add_frame(
                {f"observation.images.{camera}": image for camera, image in zip(cameras, images, strict=True)}
                | {
                    "observation.state": np.concatenate([path[t] for path in paths]).astype(np.float32),
                    "action": np.concatenate([path[t + 1] for path in paths]).astype(np.float32),
                    "task": f"grasp the {color} block" + "s with both hands" * (len(arms) > 1),
                }
            )
        dataset.save_episode()
    dataset.finalize()


if __name__ == "__main__":
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "data")
    write(folder / "franka_pick", [None], ["front", "wrist"])
    write(folder / "two_arms", ["left", "right"], ["high", "left_wrist", "right_wrist"])
    print(f"{folder}/franka_pick and {folder}/two_arms: written")
