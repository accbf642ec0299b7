"""Selection on the GPU: the entries of the reference, with ties, from ratings in three planes."""

import math
from typing import Any

import pytest
import torch

from minference.ops.groups import reference
from minference.testing import layout_of, random_qkv


# the interpreter of Triton 3.6 turns arrays of one element into numbers
@pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")
@pytest.mark.parametrize("mass", [0.9, 1.0])
@pytest.mark.parametrize("equal", [True, False])
def test_takes_the_blocks_of_the_reference(
    equal: bool, mass: float, device: torch.device, nan_poison: None
) -> None:
    from minference.ops.groups.triton_keep import take_blocks

    q, k, _ = random_qkv(1, 1, 700, 2900, device=device)
    layout = layout_of(q, k)
    blocks, groups, tiles, room, most, wider = 46, 2, layout.chunk_tiles, 16, 5, 20
    generator = torch.Generator().manual_seed(0)
    # few different values unless told, so that many are equal; some are shares beyond 1
    planes = torch.randint(-16, 2, (1, groups, 4, 3, blocks), generator=generator) / 2
    if not equal:
        planes += torch.rand(planes.shape, generator=generator)
    planes = planes.to(device)
    count = torch.zeros(1, 1, tiles, dtype=torch.int32, device=device)
    number = torch.zeros(1, 1, groups, dtype=torch.int32, device=device)
    values, others = count.new_empty(tiles * room), count.new_empty(groups * 32)
    least = math.log2(1 - mass) if mass < 1 else -math.inf
    sizes: dict[str, Any] = {"HKV": 1, "ROOM": room, "WIDER_ROOM": 32, "NB": 64}
    take_blocks[(groups, 1, 5)](
        planes, values, count, others, number, layout.first, layout.stop, 700, 2900, blocks,
        groups, 0, groups, tiles, least, least - 3, most, wider - 10,
        **sizes,
    )  # fmt: skip
    before, behind = planes[:, :, :, 2].roll(1, -1), planes[:, :, :, 1].roll(-1, -1)
    before[..., 0] = behind[..., -1] = -math.inf
    ratings = torch.stack([planes.amax(dim=3), before, behind]).amax(dim=0)
    block = torch.arange(blocks, device=device)
    for group in range(groups):
        low, stop = max(2200, 2048 + 512 * group), min(2900, 2560 + 512 * group)
        seen, near = block < -(-stop // 64), low // 128 * 2 - 1
        always = (block == 0) | (block >= near)
        best = ratings[0, group].amax(dim=0)
        flags = reference.choose(best, always, seen, least - 3, wider - 10)
        own = others[group * 32 :][: int(number[0, 0, group])] // 4
        assert own.tolist() == flags.nonzero()[:, 0].tolist()
        for tile in range(low // 128, -(-stop // 128)):
            always = (block == 0) | (block >= 2 * tile - 1)
            mine = seen & (block <= 2 * tile + 1)
            flags = reference.choose(ratings[0, group, tile % 4], always, mine, least, most)
            slot = tile - 2200 // 128
            own = values[slot * room :][: int(count[0, 0, slot])] // 4
            assert own.tolist() == flags.nonzero()[:, 0].tolist()
            assert 4 <= int(count[0, 0, slot]) <= most + 4


# the interpreter of Triton 3.6 turns arrays of one element into numbers
@pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("step", [0.5, 2**-9], ids=["equal ones", "close ones"])
def test_candidates_are_the_best_rated_and_the_near_blocks(
    step: float, dtype: torch.dtype, device: torch.device
) -> None:
    from minference.ops.groups.triton_candidates import take_candidates

    q, k, _ = random_qkv(1, 1, 700, 2900, device=device)
    layout = layout_of(q, k)
    blocks, groups, room, most = 46, 2, 64, 5
    generator = torch.Generator().manual_seed(0)
    ratings = torch.randint(-16, 16, (1, groups, 1, 1, blocks), generator=generator) * step - 3
    ratings[..., 7], ratings[..., 9] = -math.inf, -60.0
    ratings = ratings.to(device, dtype)
    places = torch.full((1, groups, room), -1, dtype=torch.int32, device=device)
    number = torch.zeros(1, groups, dtype=torch.int32, device=device)
    sizes: dict[str, Any] = {"HKV": 1, "GROUPS": 1, "PARTS": 1, "ROOM": room, "NB": 64}
    take_candidates[(groups, 1)](
        ratings, places, number, layout.first, layout.stop, 700, 2900, blocks, groups, 1, 0, most,
        **sizes,
    )  # fmt: skip
    block = torch.arange(blocks, device=device)
    for group in range(groups):
        low, stop = max(2200, 2048 + 512 * group), min(2900, 2560 + 512 * group)
        seen, near = block < -(-stop // 64), low // 128 * 2 - 1
        always = (block == 0) | (block >= near)
        flags = reference.choose(ratings[0, group, 0, 0].float(), always, seen, -math.inf, most)
        own = places[0, group, : int(number[0, group])]
        assert own.tolist() == flags.nonzero()[:, 0].tolist()
        assert not places[0, group, len(own) :].any()
