"""Data sets of images and questions, and the collators that make them a model's inputs."""

from tokenprune.data.collate import ConversationCollator, PromptCollator
from tokenprune.data.folder import FolderDataset
from tokenprune.data.hub import HubDataset
from tokenprune.data.sample import Sample, Turn
from tokenprune.data.scenes import SceneDataset

__all__ = [
    "ConversationCollator",
    "FolderDataset",
    "HubDataset",
    "PromptCollator",
    "Sample",
    "SceneDataset",
    "Turn",
]
