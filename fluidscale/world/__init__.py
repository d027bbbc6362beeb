"""The embedded world: real icons, composed into scenes with captions in GenEval's grammar. Needs no download."""

from fluidscale.world.captions import TAGS, Content
from fluidscale.world.scenes import Icon, Scene
from fluidscale.world.world import World

__all__ = ["TAGS", "Content", "Icon", "Scene", "World"]
