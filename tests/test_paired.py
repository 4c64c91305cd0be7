"""The difference of two networks on the same images and draws: its interval, by simulation and by hand, and the verdict."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import norm, t

from sslctl.evaluation.multi_label import mean_average_precision
from sslctl.evaluation.paired import compare, compare_rankings, interval_of_mean, of_groups, verdict_of


def answers(draws, images, generator, shift=0.0, spread=0.3):
    """Right answers of two networks, (R, N) bool each: images are hard or easy for both, a draw of labels is lucky for one."""
    difficulty = generator.normal(0, 1.2, images)
    both = []
    for level in (0.0, shift):
        own, luck = generator.normal(0, 0.4, images), generator.normal(0, spread, (draws, 1))
        noise = generator.normal(0, 1, (draws, images))
        both.append(torch.from_numpy(1 + level + difficulty + own + luck + noise > 0))
    return both


def share_of(condition, times, seed=0):
    generator = np.random.default_rng(seed)
    return sum(condition(generator) for _ in range(times)) / times


# --- The interval ---


@pytest.mark.parametrize("draws", [1, 5])
def test_the_interval_holds_where_there_is_no_difference(draws):
    def holds(generator):
        before, after = answers(draws, 150, generator, spread=0.3 if draws > 1 else 0)
        low, high = interval_of_mean(after.double() - before.double(), 0.95)
        return low <= 0 <= high

    assert share_of(holds, 400) == pytest.approx(0.95, abs=0.03)


def test_an_interval_over_images_alone_is_too_narrow_for_draws():
    """The control: what takes the draws for fixed calls chance a difference."""

    def holds(generator):
        before, after = answers(5, 150, generator)
        mean = (after.double() - before.double()).mean(0)
        return abs(mean.mean()) <= 1.96 * mean.std() / math.sqrt(len(mean))

    assert share_of(holds, 300) < 0.8


def test_a_difference_that_is_there_lies_within_the_interval_and_is_told_from_0():
    generator = np.random.default_rng(1)
    many = answers(2000, 1000, generator, shift=0.8, spread=0.1)
    expected = (many[1].double() - many[0].double()).mean().item()
    assert expected > 0.1
    inside = []
    for _ in range(20):
        before, after = answers(5, 150, generator, shift=0.8, spread=0.1)
        low, high = interval_of_mean(after.double() - before.double(), 0.95)
        assert low > 0
        inside.append(low <= expected <= high)
    assert sum(inside) >= 17


def test_the_interval_of_one_draw_is_bonett_and_prices():
    before, after = torch.zeros(1, 60, dtype=torch.bool), torch.zeros(1, 60, dtype=torch.bool)
    before[0, :3] = after[0, 10:21] = True  # 3 are lost, 11 won
    before[0, 30:50] = after[0, 30:50] = True
    lost, won = (3 + 1) / 62, (11 + 1) / 62
    half = norm.ppf(0.975) * math.sqrt((lost + won - (won - lost) ** 2) / 62)
    expected = won - lost - half, won - lost + half
    assert compare("x", before, after).ci95 == pytest.approx(expected)
    assert compare("x", before, after).difference == pytest.approx(8 / 60)


def test_the_interval_of_several_draws_is_that_of_readers_and_cases():
    """By loops over the table of Dorfman, Berbaum & Metz, with one image added for either side."""
    generator = np.random.default_rng(2)
    difference = np.array(generator.integers(-1, 2, (3, 7)), float)
    d = np.concatenate([difference, np.tile([1.0, -1.0], (3, 1))], 1)
    rows, columns = d.shape
    mean, of_row, of_column = d.mean(), [sum(row) / columns for row in d], [sum(c) / rows for c in d.T]
    of_draws = columns * sum((m - mean) ** 2 for m in of_row) / (rows - 1)
    of_images = rows * sum((m - mean) ** 2 for m in of_column) / columns
    rest = sum((d[i, j] - of_row[i] - of_column[j] + mean) ** 2 for i in range(rows) for j in range(columns))
    rest /= (rows - 1) * (columns - 1)
    total = of_draws + max(of_images - rest, 0)
    freedom = total**2 / (of_draws**2 / (rows - 1))
    half = t.ppf(0.95, freedom) * math.sqrt(total / (rows * columns))
    assert of_images > rest
    assert interval_of_mean(torch.from_numpy(difference), 0.9) == pytest.approx((mean - half, mean + half))


def test_draws_that_agree_on_average_alone_leave_the_spread_of_the_images():
    """Two draws whose differences are opposite on every image: no component is more than rest, and the interval no point."""
    row = torch.tensor([1.0, -1.0, 0.0, 0.0] * 10)
    low, high = interval_of_mean(torch.stack([row, -row]), 0.95)
    assert low == pytest.approx(-high)
    images = 42  # with the one that is added on either side, which alone differ from the mean, by 1
    assert high == pytest.approx(norm.ppf(0.975) * math.sqrt(2 / images / images), rel=1e-6)


def test_images_of_one_group_count_as_one():
    generator = np.random.default_rng(3)
    before, after = answers(1, 40, generator)
    groups = torch.arange(40).repeat_interleave(5)
    copied = [part.repeat_interleave(5, dim=1) for part in (before, after)]
    alone = compare("x", before, after)
    assert compare("x", *copied, groups=groups).interval == pytest.approx(alone.interval)
    narrow = compare("x", *copied).interval
    assert narrow[1] - narrow[0] < 0.8 * (alone.interval[1] - alone.interval[0])


def test_groups_of_different_sizes_keep_the_mean():
    difference = torch.tensor([[1.0, 0, 0, -1, 1, 1], [0, 0, 1, 0, 0, 1]]).double()
    values = of_groups(difference, torch.tensor([5, 5, 2, 2, 2, 7]))
    assert values.shape == (2, 3)
    assert torch.allclose(values.mean(1), difference.mean(1))


# --- The verdict ---


def verdict(generator, shift, measures=3):
    pairs = [answers(5, 100, generator, shift) for _ in range(measures)]
    return verdict_of([compare(f"m{i}", *pair, comparisons=measures) for i, pair in enumerate(pairs)])


def test_chance_alone_is_rarely_called_a_difference():
    assert share_of(lambda generator: verdict(generator, 0).kind != "not distinguishable", 200) < 0.09


@pytest.mark.parametrize(("shift", "kind"), [(2.0, "better"), (-2.0, "worse")])
def test_a_difference_is_called_by_its_name(shift, kind):
    actual = verdict(np.random.default_rng(4), shift)
    assert actual.kind == kind
    assert ("keep the frozen ones" in actual.sentence) is (kind == "worse")


def test_equal_answers_are_not_distinguishable_and_the_sentence_has_all_figures():
    before = torch.arange(100)[None] % 4 > 0
    same = verdict_of([compare("kNN", before, before, 2), compare("linear", before, before, 2)])
    assert same.kind == "not distinguishable"
    assert "kNN: 75.0 → 75.0 %, +0.0 (-" in same.sentence
    assert "linear: 75.0 → 75.0 %" in same.sentence
    assert "keep the frozen ones" in same.sentence


def test_one_measure_better_and_one_worse_is_said_as_such():
    before, after = torch.arange(200)[None] % 2 > 0, torch.arange(200)[None] % 4 > 0
    mixed = verdict_of([compare("a", before, after, 2), compare("b", after, before, 2)])
    assert mixed.kind == "mixed"


def test_answers_of_other_draws_are_not_compared():
    with pytest.raises(ValueError, match="not of the same draws"):
        compare("x", torch.zeros(2, 9), torch.zeros(3, 9))


# --- Several labels an image ---


def rankings(draws, images, generator, strength=(1.0, 1.0), spread=0.4):
    """Targets (N, 3) and scores before and after, (N, 3) of each draw: images are hard or easy, a draw is lucky for one."""
    targets = torch.from_numpy(generator.random((images, 3)) < 0.3)
    hard, both = generator.normal(0, 0.6, (images, 3)), []
    for level in strength:
        own = generator.normal(0, 0.6, (images, 3))
        luck = generator.normal(level, spread, draws)
        noise = generator.normal(0, 0.6, (draws, images, 3))
        both.append(list(torch.from_numpy(hard + own + noise + luck[:, None, None] * targets.numpy())))
    return targets, *both


def test_rankings_are_compared_on_the_same_resampled_images():
    targets, weak, strong = rankings(1, 80, np.random.default_rng(0), (0.5, 2.5))
    better = compare_rankings("x", weak, strong, targets)
    assert better.difference == pytest.approx(better.after - better.before)
    assert better.direction == 1
    same = compare_rankings("x", weak, weak, targets)
    assert (same.interval, same.direction) == ((0.0, 0.0), 0)
    assert compare_rankings("x", weak, strong, targets, groups=torch.arange(80) // 8).ci95 != better.ci95


def test_rankings_of_several_draws_are_compared_as_readers_and_cases():
    targets, weak, strong = rankings(4, 300, np.random.default_rng(0), (0.5, 2.5), spread=0.01)
    better = compare_rankings("x", weak, strong, targets)
    before, after = (np.mean([mean_average_precision(s, targets) for s in part]) for part in (weak, strong))
    assert (better.before, better.after, better.difference) == pytest.approx((before, after, after - before))
    assert (better.draws, better.direction) == (4, 1)
    # Draws that are all alike: nothing is left but the images, and the interval is about that of resampled ones.
    alike, resampled = (compare_rankings("x", weak[:1] * n, strong[:1] * n, targets) for n in (3, 1))
    assert alike.ci95 == pytest.approx(resampled.ci95, abs=0.25 * (resampled.ci95[1] - resampled.ci95[0]))
    # Images of one group count as one.
    groups = torch.arange(300).repeat_interleave(3)
    copied = [[scores.repeat_interleave(3, dim=0) for scores in part] for part in (weak, strong)]
    grouped = compare_rankings("x", *copied, targets.repeat_interleave(3, dim=0), groups=groups)
    assert grouped.ci95 == pytest.approx(better.ci95, abs=0.01)
    narrow = compare_rankings("x", *copied, targets.repeat_interleave(3, dim=0)).ci95
    assert narrow[1] - narrow[0] < 0.8 * (better.ci95[1] - better.ci95[0])


def test_the_interval_of_rankings_holds_where_there_is_no_difference():
    differences, halves = [], []

    def holds(generator):
        targets, before, after = rankings(5, 150, generator)
        compared = compare_rankings("x", before, after, targets)
        low, high = compared.ci95
        differences.append(compared.difference)
        halves.append((high - low) / 2)
        return low <= 0 <= high

    assert share_of(holds, 100) == pytest.approx(0.95, abs=0.05)
    # Nor is it wider than it need be: of a known deviation it were 1.96 of them, of five draws' Student's t is more.
    assert 1.96 < np.mean(halves) / np.std(differences) < 3


def test_the_interval_of_rankings_of_a_rare_label_ends_where_differences_do():
    targets = torch.arange(200)[:, None] == 7
    worst, best = -targets.double(), targets.double()
    compared = compare_rankings("x", [worst, best], [best, worst], targets)
    assert (compared.difference, compared.ci95, compared.interval) == (0, (-1, 1), (-1, 1))
