"""A simulated arm that fetches one of three blocks, as a LeRobot dataset; and a small policy that learns it quickly.

LIBERO's columns: two cameras; position, quaternion (x, y, z, w) and gripper as the state; displacements of position and
rotation and the gripper's command, -1 opens and 1 closes, as the action. The task names the block by its color.
"""

import math
import zlib
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import nn

from rlinf_core import LeRobotDatasetConfig, PolicyConfig, PolicyOutput, ShardUnit, hookimpl
from rlinf_core.testing.planted_data import Episode, Layout, write_episodes

FPS = 10
SIDE, SCENE = 64, 160
COLORS = {"red": (200, 40, 40), "green": (40, 150, 60), "blue": (40, 70, 200)}
VERBS = ("fetch", "lift", "grab")
STATE = ["x", "y", "z", "qx", "qy", "qz", "qw", "gripper"]
ACTION = ["dx", "dy", "dz", "droll", "dpitch", "dyaw", "gripper"]
REACH = 0.05
"""Meters of an action of 1."""
TURN = 0.2
"""Radians of an action of 1."""


def quaternion(roll, pitch, yaw):
    """x, y, z, w of extrinsic angles."""
    (cr, sr), (cp, sp), (cy, sy) = ((math.cos(a / 2), math.sin(a / 2)) for a in (roll, pitch, yaw))
    return np.array(
        [
            sr * cp * cy - cr * sp * sy,
            cr * sp * cy + sr * cp * sy,
            cr * cp * sy - sr * sp * cy,
            cr * cp * cy + sr * sp * sy,
        ]
    )


def scene(blocks, hand, yaw, gripper):
    """The table from above, [SCENE, SCENE, 3]; x to the right and y up, both from -0.4 to 0.4 m."""
    image = Image.new("RGB", (SCENE, SCENE), (196, 178, 150))
    draw = ImageDraw.Draw(image)
    draw.rectangle((0, 0, SCENE, 26), fill=(90, 96, 110))  # The wall behind the table,
    draw.rectangle((10, 4, 44, 20), fill=(220, 200, 90))  # with a sign, so that no flip looks the same.
    draw.polygon([(SCENE, SCENE), (SCENE, 110), (118, SCENE)], fill=(120, 90, 70))

    def at(x, y):
        return (SCENE * (x + 0.4) / 0.8, SCENE * (0.4 - y) / 0.8)

    for (x, y, angle), color in blocks:
        corners = [(x + 0.045 * math.cos(angle + k), y + 0.045 * math.sin(angle + k)) for k in np.pi * np.arange(4) / 2]
        draw.polygon([at(*corner) for corner in corners], fill=color)
    x, y, z = hand
    draw.line([at(-0.38, 0.3), at(x, y)], fill=(60, 60, 66), width=5)
    size = 0.03 + 0.1 * z  # Nearer to the camera, it is larger.
    for side in (-1, 1):
        reach = side * size * (1 - 0.7 * gripper)
        tip = x + reach * math.cos(yaw), y + reach * math.sin(yaw)
        draw.line([at(x, y), at(*tip)], fill=(25, 25, 28), width=3)
        draw.ellipse([*(c - 3 for c in at(*tip)), *(c + 3 for c in at(*tip))], fill=(240, 240, 235))
    return image, at(x, y)


def views(blocks, hand, yaw, gripper):
    """Images of both cameras, [SIDE, SIDE, 3]."""
    image, (u, v) = scene(blocks, hand, yaw, gripper)
    front = image.resize((SIDE, SIDE), Image.Resampling.BOX)
    zoom = 0.55 * (0.6 + hand[2]) * SCENE / SIDE
    c, s = zoom * math.cos(yaw), zoom * math.sin(yaw)
    data = (c, s, u - (c + s) * SIDE / 2, -s, c, v - (c - s) * SIDE / 2)
    wrist = image.transform((SIDE, SIDE), Image.Transform.AFFINE, data, Image.Resampling.BILINEAR)
    return np.asarray(front), np.asarray(wrist)


def episode(generator, color):
    """Rows of one episode: images, states and actions."""
    places: list[Any] = []
    while len(places) < 3:
        place = generator.uniform(-0.28, 0.28), generator.uniform(-0.3, 0.18)
        if all(math.dist(place, other[:2]) > 0.14 for other in places):
            places.append((*place, generator.uniform(-0.7, 0.7)))
    blocks = list(zip(places, COLORS.values(), strict=True))
    goal = places[list(COLORS).index(color)]
    hand = np.array([generator.uniform(-0.3, 0.3), generator.uniform(-0.25, 0.25), generator.uniform(0.3, 0.4)])
    angles = np.array([generator.normal(0, 0.08), generator.normal(0, 0.08), generator.uniform(-0.9, 0.9)])
    gripper, rows, closing = 0.0, [], 0
    while len(rows) < 60:
        above = math.dist(hand[:2], goal[:2]) > 0.02
        target = np.array([*goal[:2], 0.25 if above else 0.03])
        holding = closing > 3
        if holding:
            target = np.array([*goal[:2], 0.35])
        closing += (not above and hand[2] < 0.06) or closing > 0
        move = np.clip((target - hand) / REACH, -1, 1) * 0.9 + generator.normal(0, 0.03, 3)
        turn = np.clip((np.array([0, 0, goal[2]]) - angles) / TURN, -1, 1) * 0.6 + generator.normal(0, 0.02, 3)
        action = np.clip(np.r_[move, turn, 1.0 if closing else -1.0], -1, 1)
        if closing and not holding:
            action[:3] *= 0.1
        state = np.r_[hand, quaternion(*angles), gripper]
        rows.append((*views(blocks, hand, angles[2], gripper), state, action))
        hand = hand + REACH * action[:3]
        angles = angles + TURN * action[3:6]
        gripper = float(np.clip(gripper + 0.35 * action[6], 0, 1))
        if holding and hand[2] > 0.3:
            break
    return rows


def write(root, episodes=60, seed=0):
    """Write a dataset; tasks take turns."""
    generator, found = np.random.default_rng(seed), []
    for number in range(episodes):
        color = list(COLORS)[number % 3]
        front, wrist, state, action = map(np.stack, zip(*episode(generator, color), strict=True))
        images = {"observation.images.front": front, "observation.images.wrist": wrist}
        task = f"{VERBS[number % 3]} the {color} block"
        found.append(Episode(images, state.astype(np.float32), action.astype(np.float32), task))
    names = {"observation.state": STATE, "action": ACTION}
    return write_episodes(root, found, Layout({"observation.state": 8}, {"action": 7}, names, FPS))


class SmallArm(LeRobotDatasetConfig):
    """The columns."""

    run_defaults: ClassVar = {"policy": {"type": "small_arm"}}

    images: dict[str, str] = {"front": "observation.images.front", "wrist": "observation.images.wrist"}


class SmallArmPolicy(PolicyConfig):
    """Cameras, state and the words of the prompt -> a chunk of actions; squared error."""

    run_defaults: ClassVar = {"optim": {"lr": 2e-3, "min_lr": 8e-4, "warmup_steps": 20, "weight_decay": 0.05}}
    normalization: ClassVar[Literal["mean_std", "quantile", "none"]] = "quantile"

    type: Literal["small_arm"] = "small_arm"
    cameras: int = 2
    state_dim: int = 8
    action_dim: int = 7
    action_horizon: int = 8
    width: int = 192

    def chunk_length(self):
        return self.action_horizon

    def draw(self, generator):
        return {"noise": generator.standard_normal((self.action_horizon, self.action_dim), np.float32)}

    def collate(self, samples):
        keys = ("state", "actions", "actions_is_pad", "noise")
        batch = {key: torch.from_numpy(np.stack([s[key] for s in samples])) for key in keys if key in samples[0]}
        names = sorted(samples[0]["images"])
        batch["images"] = torch.from_numpy(np.stack([[s["images"][name] for name in names] for s in samples]))
        words = np.zeros((len(samples), 64), np.float32)
        for row, sample in enumerate(samples):
            for word in sample["prompt"].split():
                words[row, zlib.crc32(word.encode()) % 64] += 1
        batch["words"] = torch.from_numpy(words)
        return batch

    def build(self):
        return SmallArmModel(self)


class SmallArmModel(nn.Module):
    """Convolutions with the prompt's words as gains of channels."""

    def __init__(self, config):
        super().__init__()
        self.shape = (config.action_horizon, config.action_dim)
        sizes = ((3 * config.cameras, 24), (24, 48), (48, 48), (48, 48))
        self.eye = nn.ModuleList(nn.Conv2d(a, b, 3, stride=2, padding=1) for a, b in sizes)
        self.words = nn.Linear(64, 2 * 48)
        self.enter = nn.Linear(48 * 16 + config.state_dim + 64, config.width)
        self.body = nn.Sequential(
            nn.GELU(), nn.Linear(config.width, config.width), nn.GELU(), nn.Linear(config.width, math.prod(self.shape))
        )

    def forward(self, batch):
        error = (self._actions(batch) - batch["actions"]).square().mean(-1)
        within = ~batch["actions_is_pad"]
        losses = (error * within).sum(1) / within.sum(1)
        return PolicyOutput(losses.sum(), torch.tensor(float(len(losses)), device=losses.device), {})

    def sample_actions(self, batch, noise):
        return self._actions(batch)

    def _actions(self, batch):
        x = batch["images"].flatten(0, 1).permute(0, 3, 1, 2).float() / 127.5 - 1
        x = x.unflatten(0, batch["images"].shape[:2]).flatten(1, 2)
        gain, shift = self.words(batch["words"])[..., None, None].chunk(2, 1)
        for number, layer in enumerate(self.eye):
            x = layer(x)
            if number == 1:
                x = x * (1 + gain) + shift
            x = nn.functional.relu(x)
        x = torch.cat((x.flatten(1), batch["state"], batch["words"]), 1)
        return self.body(self.enter(x)).view(-1, *self.shape)

    def shard_units(self):
        yield ShardUnit(self.eye, "fp32")
        yield ShardUnit(self.body, "fp32", block=True)

    def initial_value(self, name, shape, generator):
        if len(shape) == 1:
            return torch.zeros(shape)
        return torch.randn(shape, generator=generator) * math.sqrt(1.6 / math.prod(shape[1:]))

    def rebuild_buffers(self):
        pass


@hookimpl
def rlinf_register_policies():
    return [SmallArmPolicy]
