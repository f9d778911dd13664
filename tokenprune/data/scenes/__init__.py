"""Generated scenes with questions: what they show, the two levels, the data set."""

from tokenprune.data.scenes import easy, hard
from tokenprune.data.scenes.dataset import LEVELS, SceneDataset
from tokenprune.data.scenes.pictures import (
    COLOURS,
    SYMBOLS,
    Item,
    Question,
    Scene,
    Sign,
    Style,
    draw_scene,
)

__all__ = [
    "COLOURS",
    "LEVELS",
    "SYMBOLS",
    "Item",
    "Question",
    "Scene",
    "SceneDataset",
    "Sign",
    "Style",
    "draw_scene",
    "easy",
    "hard",
]
