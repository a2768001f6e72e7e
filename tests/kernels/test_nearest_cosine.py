"""Distances within groups against a plain double loop, and the degenerate rows."""

from importlib import import_module

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gardo_kernels import nearest_cosine
from gardo_kernels._launch_shape import capability, size_class, trying
from tests.kernels.launches import recorded


def by_hand(e_BD, groups):
    """Nearest and mean distance by a loop over pairs in fp64; zero rows have cosine 0."""
    e = e_BD.double()
    nearest, mean = [], []
    for i, group in enumerate(groups):
        members = [j for j, g in enumerate(groups) if g == group]
        pairs = {
            (j, k): 1.0 - float(e[j] @ e[k] / (e[j].norm() * e[k].norm()).clamp(min=1e-300))
            for j in members
            for k in members
            if j != k
        }
        nearest.append(min((pairs[i, k] for k in members if k != i), default=0.0))
        mean.append(sum(pairs.values()) / len(pairs) if pairs else 0.0)
    return torch.tensor(nearest), torch.tensor(mean)


@settings(deadline=None, max_examples=30)
@given(
    groups=st.lists(st.integers(-3, 3), min_size=1, max_size=10),
    width=st.integers(1, 6),
    seed=st.integers(0, 1000),
)
def test_matches_the_loop_for_groups_of_any_size_and_order(groups, width, seed):
    e_BD = torch.randn(len(groups), width, generator=torch.Generator().manual_seed(seed))
    nearest, mean = nearest_cosine(e_BD, torch.tensor(groups))
    expected_nearest, expected_mean = by_hand(e_BD, groups)
    torch.testing.assert_close(nearest, expected_nearest, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(mean, expected_mean, rtol=1e-5, atol=1e-6)


def test_by_hand():
    e_BD = torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 3.0], [-1.0, 0.0], [5.0, 0.0]])
    group_B = torch.tensor([7, 7, 7, 9, 9])
    nearest, mean = nearest_cosine(e_BD, group_B)
    half = 1 - 0.5**0.5
    torch.testing.assert_close(nearest, torch.tensor([half, half, half, 2.0, 2.0]))
    pairwise = (1 + 2 * half) / 3
    torch.testing.assert_close(mean, torch.tensor([pairwise] * 3 + [2.0] * 2))
    assert nearest.dtype == mean.dtype == torch.float32


def test_identical_rows_have_distance_exactly_zero():
    row = torch.randn(1, 1024, generator=torch.Generator().manual_seed(3))
    nearest, mean = nearest_cosine(row.expand(24, -1), torch.zeros(24, dtype=torch.int64))
    assert torch.equal(nearest, torch.zeros(24)) and torch.equal(mean, torch.zeros(24))


def test_small_distances_keep_their_digits():
    # 1 - cos in fp32 would leave 6e-8 of rounding on a distance of 5e-7
    direction = torch.zeros(2, 512)
    direction[:, 0] = 1.0
    direction[1, 1] = 1e-3
    nearest, _ = nearest_cosine(direction, torch.zeros(2, dtype=torch.int64))
    expected = 1 - 1 / (1 + 1e-6) ** 0.5
    assert nearest[0].item() == pytest.approx(expected, rel=1e-4)


def test_zero_rows_have_cosine_zero():
    e_BD = torch.tensor([[0.0, 0.0], [0.0, 0.0], [1.0, 0.0]])
    nearest, mean = nearest_cosine(e_BD, torch.zeros(3, dtype=torch.int64))
    assert torch.equal(nearest, torch.ones(3)) and torch.equal(mean, torch.ones(3))


def test_a_group_of_one_has_no_distance():
    nearest, mean = nearest_cosine(torch.eye(3), torch.tensor([0, 1, 1]))
    for distance in (nearest, mean):
        assert distance[0] == 0
        torch.testing.assert_close(distance[1:], torch.ones(2))


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_scale_does_not_matter(scale):
    e_BD = torch.randn(6, 5, generator=torch.Generator().manual_seed(1))
    group_B = torch.tensor([0, 0, 0, 1, 1, 1])
    for ours, plain in zip(
        nearest_cosine(e_BD * scale, group_B), nearest_cosine(e_BD, group_B), strict=True
    ):
        torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-6)


def test_no_gradient_and_low_precision():
    e_BD = torch.randn(4, 5, generator=torch.Generator().manual_seed(1)).bfloat16()
    group_B = torch.zeros(4, dtype=torch.int64)
    out = nearest_cosine(e_BD.clone().requires_grad_(), group_B)
    assert not any(x.requires_grad for x in out)
    for ours, wide in zip(out, nearest_cosine(e_BD.float(), group_B), strict=True):
        assert torch.equal(ours, wide)


def test_bad_inputs():
    e_BD, group_B = torch.randn(4, 5), torch.zeros(4, dtype=torch.int64)
    with pytest.raises(ValueError, match="e_BD has shape"):
        nearest_cosine(e_BD[0], group_B)
    with pytest.raises(ValueError, match="e_BD has shape"):
        nearest_cosine(e_BD[:0], group_B[:0])
    with pytest.raises(ValueError, match=r"group_B has shape \(3,\)"):
        nearest_cosine(e_BD, group_B[:3])
    with pytest.raises(ValueError, match="group_B has dtype"):
        nearest_cosine(e_BD, group_B.float())
    with pytest.raises(ValueError, match="e_BD has dtype"):
        nearest_cosine(e_BD.long(), group_B)
    with pytest.raises(ValueError, match="group_B is on meta"):
        nearest_cosine(e_BD, group_B.to("meta"))
    with pytest.raises(ValueError, match="the kernels work in fp32"):
        nearest_cosine(e_BD.double(), group_B, backend="triton")


def test_reference_in_blocks_and_without_groups():
    """More rows than a block of the reference, against all distances at once."""
    e_BD = features(1100, 8)
    nearest, mean = nearest_cosine(e_BD, backend="torch")
    expected_nearest, expected_mean = matrix(e_BD, None)
    torch.testing.assert_close(nearest.double(), expected_nearest, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(mean.double(), expected_mean, rtol=1e-6, atol=1e-9)


# ---- the kernels ---------------------------------------------------------------------------------

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # there under Triton's interpreter
MODULE = import_module("gardo_kernels.nearest_cosine")
UNIT = import_module("gardo_kernels._unit_rows")
MANY = MODULE.MANY
# n is rounded two or three times in each feature, by 2^-24 of it: a distance d by less than
# sqrt(2 d) 2^-22 or 5e-7. Tensor cores add products of 22 bits with rounding towards 0.
CHORDS, TILES = 1e-6, 3e-6


def features(rows, width, dtype=torch.float32, seed=0):
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)).to(dtype)


def unequal(rows, seed=0):
    """One group of half the rows, wider than a tile, and small ones, in any order; any ids."""
    id_B = torch.arange(rows).clamp(min=rows // 2) * 10**10
    id_B[-4:-1] = -3
    return id_B[torch.randperm(rows, generator=torch.Generator().manual_seed(seed))]


def matrix(e_BD, group_B):
    """All distances at once in fp64; rows without a direction are not for it."""
    e = e_BD.double()
    distance = 1.0 - (e @ e.T) / (e.norm(dim=1)[:, None] * e.norm(dim=1))
    group_B = torch.zeros(len(e)) if group_B is None else group_B
    pair = (group_B[:, None] == group_B).fill_diagonal_(False)
    size = pair.sum(1) + 1
    own = torch.where(pair, distance, 0.0).sum(1)
    total = torch.stack([own[group_B == g].sum() for g in group_B])
    nearest = torch.where(pair, distance, torch.inf).amin(1)
    nearest = torch.where(size == 1, 0.0, nearest)
    return nearest, total / (size * (size - 1)).clamp(min=1)


def kernels(e_BD, group_B=None):
    group_B = None if group_B is None else group_B.to(DEVICE)
    return tuple(x.cpu() for x in nearest_cosine(e_BD.to(DEVICE), group_B, backend="triton"))


def assert_close(ours, exact, tolerance):
    for mine, theirs in zip(ours, exact, strict=True):
        assert mine.dtype == torch.float32 and mine.shape == theirs.shape
        torch.testing.assert_close(mine.double(), theirs, rtol=0, atol=tolerance)


@pytest.mark.parametrize("width", [1, 5, 33, 130])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [38, MANY + 12])
def test_kernels_are_the_formula(width, dtype, rows):
    """Groups of any size and order, as chords; or one group of three tiles."""
    e_BD = features(rows, width, dtype)
    group_B, tolerance = (None, TILES) if rows > MANY else (unequal(rows), CHORDS)
    assert_close(kernels(e_BD, group_B), matrix(e_BD, group_B), tolerance)


def test_kernels_go_over_blocks_of_features_of_ids_and_of_means():
    key = ("nearest_cosine", capability(torch.device(DEVICE)), size_class(38, 70))
    e_BD, group_B = features(38, 70), unequal(38)
    with trying(key, MODULE.DEFAULT._replace(block=32, chunk=16)), recorded() as launches:
        kernels(e_BD, group_B)
    assert [launch.arguments["BLOCK"] for launch in launches] == [32, 16]
    with trying(key, MODULE.DEFAULT._replace(block=32, chunk=16)):
        assert_close(kernels(e_BD, group_B), matrix(e_BD, group_B), CHORDS)


def test_rows_of_one_group_are_divided_block_by_block():
    e_BD = features(MANY + 1, UNIT.SHAPE.block + 30)
    assert_close(kernels(e_BD), matrix(e_BD, None), TILES)


@pytest.mark.parametrize("size", [8, 24, 30, 44])
def test_pairs_of_tiles_are_computed_by_the_first_or_by_both(size):
    """Groups of one tile, of as many as splits, and of more; twins in the first and each tile."""
    e_BD, group_B = features(2 * size, 20), torch.arange(2 * size) // size
    twins = torch.arange(size + 7, 2 * size, MODULE.DEFAULT.rows)
    firsts = torch.arange(size, size + len(twins))
    e_BD[twins] = e_BD[firsts]
    ours = kernels(e_BD, group_B)
    assert_close(ours, matrix(e_BD, group_B), CHORDS)
    assert (ours[0] == 0).nonzero()[:, 0].tolist() == sorted([*firsts.tolist(), *twins.tolist()])


@pytest.mark.skipif(DEVICE == "cuda", reason="counts what the interpreter runs")
def test_near_tiles_are_computed_once(monkeypatch):
    """Of three tiles of one group there are six pairs, a tile with itself included."""
    computed = []

    def counting(e_ptr, row, column, *sizes):
        computed.append((int(row.handle.data[0]), int(column.handle.data[0])))
        return distances(e_ptr, row, column, *sizes)

    distances = MODULE._distances
    monkeypatch.setattr(MODULE, "_distances", counting)
    e_BD = features(24, 20)
    assert_close(kernels(e_BD), matrix(e_BD, None), CHORDS)
    assert sorted(computed) == [(a, b) for a in (0, 8, 16) for b in (0, 8, 16) if a <= b]


@settings(deadline=None, max_examples=15)
@given(
    groups=st.lists(st.integers(-3, 3), min_size=1, max_size=20),
    width=st.integers(1, 6),
    seed=st.integers(0, 1000),
)
def test_kernels_match_the_loop_for_groups_of_any_size_and_order(groups, width, seed):
    e_BD = features(len(groups), width, seed=seed)
    expected = (x.double() for x in by_hand(e_BD, groups))
    assert_close(kernels(e_BD, torch.tensor(groups)), expected, CHORDS)


def test_tiles_and_chords_agree(monkeypatch):
    monkeypatch.setattr(MODULE, "MANY", 60)
    e_BD = features(70, 20)
    tiles, chords = kernels(e_BD), kernels(e_BD, torch.full((70,), 7))
    assert not torch.equal(tiles[0], chords[0])  # two ways to the same
    assert_close(tiles, [x.double() for x in chords], TILES)


# Rows of chords, and of tiles where one group of all has them.
COUNTS = pytest.mark.parametrize("rows", [20, MANY + 2])


@COUNTS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernels_give_identical_rows_exactly_zero(rows, dtype):
    e_BD = features(rows, 70, dtype)
    nearest, mean = kernels(e_BD[:1].expand(rows, -1))
    assert torch.equal(nearest, torch.zeros(rows))
    # of tiles the mean is a sum of products, whose last bit BLAS may round by a row's place in it
    assert float(mean.abs().max()) <= (0 if rows < MANY else torch.finfo(torch.float32).eps)
    e_BD[3] = e_BD[rows - 1]
    nearest, _ = kernels(e_BD)
    assert (nearest == 0).nonzero()[:, 0].tolist() == [3, rows - 1]


def test_chords_keep_the_digits_of_small_distances():
    e_BD = features(1, 1024) + 1e-3 * features(6, 1024, seed=1)
    ours, exact = kernels(e_BD), matrix(e_BD, None)
    assert float(exact[0].max()) < 2e-6
    for mine, theirs in zip(ours, exact, strict=True):
        torch.testing.assert_close(mine.double(), theirs, rtol=1e-4, atol=0)


@COUNTS
def test_kernels_give_zero_rows_cosine_zero(rows):
    e_BD = features(rows, 9).abs()  # cosines above 0, distances below 1
    e_BD[[2, rows - 2]] = 0
    ours = kernels(e_BD)
    assert_close(ours, [x.double() for x in nearest_cosine(e_BD, backend="torch")], TILES)
    assert (ours[0] == 1).nonzero()[:, 0].tolist() == [2, rows - 2]


@COUNTS
@pytest.mark.parametrize("scale", [1e-40, 1e-30, 1e30])
def test_kernels_do_not_mind_the_scale(rows, scale):
    e_BD = features(rows, 9) * scale
    assert_close(kernels(e_BD), matrix(e_BD, None), TILES)


@COUNTS
def test_kernels_take_rows_of_any_scale_side_by_side(rows):
    e_BD = features(rows, 9)
    e_BD /= e_BD.abs().amax(1, keepdim=True)
    scale = torch.tensor([1e-40, 1e-30, 1e-15, 1.0, 1e15, 1e30, 3.4e38])
    e_BD *= scale[torch.arange(rows) % 7, None]
    assert_close(kernels(e_BD), matrix(e_BD, None), TILES)


@COUNTS
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_what_is_not_finite_never_looks_plausible(rows, bad, backend):
    e_BD = features(rows, 9)
    e_BD[0] = 0
    e_BD[3, 8] = bad
    for x in nearest_cosine(e_BD.to(DEVICE), backend=backend):
        assert x.isnan().all()
    group_B = torch.tensor([5, 5, 9, 5, 9]), torch.tensor([5, 7, 9, 4, 9])
    for groups, nan in zip(group_B, ([0, 1, 3], [3]), strict=True):
        for x in nearest_cosine(e_BD[:5].to(DEVICE), groups.to(DEVICE), backend=backend):
            assert x.isnan().nonzero()[:, 0].tolist() == nan


def test_a_group_shares_the_bits_of_its_mean_wherever_its_rows_lie():
    group_B = unequal(38)
    nearest, mean = kernels(features(38, 33), group_B)
    for g in group_B.unique():
        assert mean[group_B == g].unique().numel() == 1
    order = torch.randperm(38, generator=torch.Generator().manual_seed(4))
    moved_nearest, moved_mean = kernels(features(38, 33)[order], group_B[order])
    assert torch.equal(moved_nearest, nearest[order])
    torch.testing.assert_close(moved_mean, mean[order], rtol=1e-6, atol=0)


@pytest.mark.parametrize("grouped", [True, False])
def test_kernels_copy_what_is_strided_and_repeat_their_bits(grouped):
    rows = 21 if grouped else MANY + 2
    e_BD, group_B = features(rows, 40), unequal(rows).int() if grouped else None
    plain = kernels(e_BD.contiguous(), group_B)
    strided = e_BD.T.contiguous().T
    apart = None if group_B is None else group_B.repeat_interleave(2)[::2]
    assert not strided.is_contiguous()
    for _ in range(2):
        again = kernels(strided, apart)
        assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


@COUNTS
def test_kernels_do_not_read_what_they_did_not_write(monkeypatch, rows):
    """Poisoned outputs: every `empty` comes full of NaN, or of what is no row."""
    expected = kernels(features(rows, 20))

    def poisoned(self, *size, dtype=None, device=None):
        dtype = dtype or self.dtype
        value = torch.nan if dtype.is_floating_point else -(10**6)
        return torch.full(size, value, dtype=dtype, device=device or self.device)

    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned)
    for mine, theirs in zip(kernels(features(rows, 20)), expected, strict=True):
        assert torch.equal(mine, theirs) and not mine.isnan().any()


@pytest.mark.parametrize("grouped", [True, False])
def test_opcheck(grouped):
    group_B = torch.tensor([1, 0, 1], device=DEVICE) if grouped else None
    arguments = (features(3, 4).to(DEVICE), group_B)
    torch.library.opcheck(torch.ops.gardo.nearest_cosine.default, arguments)


def test_a_compiler_sees_one_graph_without_a_gradient():
    e_BD, group_B = features(6, 5).to(DEVICE), torch.tensor([1, 0, 1, 0, 0, 2], device=DEVICE)

    def distances(e_BD):
        return nearest_cosine(e_BD, group_B, backend="triton")

    compiled = torch.compile(distances, fullgraph=True, backend="aot_eager")
    traced = compiled(e_BD.clone().requires_grad_())
    for mine, theirs in zip(traced, distances(e_BD), strict=True):
        assert torch.equal(mine, theirs) and not mine.requires_grad
