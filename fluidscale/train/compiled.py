"""Blocks compiled by torch: what lies between two matrix products becomes few kernels, which a GPU waits less for."""

from __future__ import annotations

import logging
import os
import shutil
import warnings

import torch

from fluidscale.model.build import FluidModel
from fluidscale.model.denoiser import Denoiser
from fluidscale.model.transformer import Block

log = logging.getLogger(__name__)


def compile_blocks(model: FluidModel) -> None:
    """Compiles the forward passes of the blocks and of the denoiser: blocks of a kind share what was compiled, so depth
    costs no further time. Without a C compiler, which torch's own needs, the model is left as it is.

    Losses and gradients agree with the model's own to rounding, not to the last digit.
    """
    if not any(map(shutil.which, [os.environ["CC"]] if "CC" in os.environ else ["gcc", "clang"])):
        log.warning("no C compiler (CC, gcc or clang): training goes on without compiling")
        return
    # Tables kept by functools.cache are traced anew, which is all this warning says.
    warnings.filterwarnings("ignore", message="Dynamo detected a call to a `functools.lru_cache`")
    # A worker trains one model after the other, and what is compiled is kept for eight shapes only.
    torch.compiler.reset()
    for module in [m for m in model.modules() if isinstance(m, (Block, Denoiser))]:
        module.forward = torch.compile(module.forward)  # pyright: ignore[reportAttributeAccessIssue]
