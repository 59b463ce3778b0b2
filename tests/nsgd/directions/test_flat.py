"""Parameters of an optimizer laid end to end."""

from __future__ import annotations

import torch
from torch import nn

from nsgd.directions.flat import blocks_of


def test_views_lie_in_memory_as_the_parameters_do():
    wide = nn.Parameter(torch.zeros(4, 3, 5, 5).to(memory_format=torch.channels_last))
    scalar, empty = nn.Parameter(torch.zeros(())), nn.Parameter(torch.zeros(0, 3))
    (block,) = blocks_of([(0, wide), (0, scalar), (0, empty)], None)
    views = block.views(block.vector())
    assert [view.shape for view in views] == [p.shape for p in block.params]
    assert views[0].stride() == wide.stride()
    assert block.view(block.rows(2), 0).shape == (2, *wide.shape)
