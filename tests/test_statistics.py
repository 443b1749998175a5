"""Scores against scikit-learn, the bootstrap against a slow literal version and its own promise."""

import itertools

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import accuracy_score, cohen_kappa_score, f1_score

from helpers import quality, statistics


def _predictions(seed, n=60, n_classes=4):
    rng = np.random.default_rng(seed)
    y = rng.integers(0, n_classes, n)
    yhat = np.where(rng.random(n) < 0.6, y, rng.integers(0, n_classes, n))
    return y, yhat


@pytest.mark.parametrize("seed", range(5))
def test_scores_are_those_of_scikit_learn(seed):
    y, yhat = _predictions(seed)
    labels = list(range(5))  # the fifth class never occurs
    found = statistics.scores(y, yhat, 5)
    assert found["accuracy"] == pytest.approx(accuracy_score(y, yhat))
    expected = f1_score(y, yhat, labels=labels, average="macro", zero_division=0)
    assert found["macro_f1"] == pytest.approx(expected)
    expected = cohen_kappa_score(y, yhat, labels=labels, weights="quadratic")
    assert found["kappa"] == pytest.approx(expected)


def test_named_labels_give_the_same_scores():
    y, yhat = _predictions(0)
    names = np.array(["benign", "well", "moderate", "poor"])
    assert statistics.scores(names[y], names[yhat], list(names)) == statistics.scores(y, yhat, 4)


def test_rows_of_a_confusion_matrix_are_the_truth():
    np.testing.assert_array_equal(
        statistics.confusion([0, 0, 1, 2], [1, 1, 1, 0], 3), [[0, 2, 0], [0, 1, 0], [1, 0, 0]]
    )


def test_kappa_knows_the_order_of_the_grades():
    y = np.array([0, 1, 2, 3] * 5)
    near, far = y.copy(), y.copy()
    near[:4], far[:4] = [1, 2, 3, 2], [3, 3, 0, 0]
    assert statistics.scores(y, near, 4)["accuracy"] == statistics.scores(y, far, 4)["accuracy"]
    assert statistics.scores(y, near, 4)["kappa"] > statistics.scores(y, far, 4)["kappa"]


def test_degenerate_cases_are_defined():
    same = statistics.scores([2, 2, 2], [2, 2, 2], 4)
    assert same == {"accuracy": 1.0, "macro_f1": 0.25, "kappa": 1.0}
    constant = statistics.scores([0, 1, 2, 3], [1, 1, 1, 1], 4)
    assert constant["kappa"] == pytest.approx(0)


def test_relative_gain_by_hand():
    gain = statistics.average_relative_gain({"a": 0.6, "b": 0.9}, {"a": 0.5, "b": 1.0})
    assert gain == pytest.approx(100 * (0.2 - 0.1) / 2)


def _literal_bootstrap(y, a, b, groups, n_classes, metric, n_boot, rng):
    """Images of drawn patients put side by side, scored by :func:`statistics.scores`."""
    names = np.unique(groups)
    sample = []
    patients, seeds = (
        rng.multinomial(n, np.full(n, 1 / n), size=n_boot) for n in (len(names), len(a))
    )
    for counts, repeats in zip(patients, seeds, strict=True):
        rows = np.concatenate([
            np.repeat(np.flatnonzero(groups == name), count)
            for name, count in zip(names, counts, strict=True)
        ])  # fmt: skip
        difference = [
            statistics.scores(y[rows], vb[rows], n_classes)[metric]
            - statistics.scores(y[rows], va[rows], n_classes)[metric]
            for va, vb in zip(a, b, strict=True)
        ]
        sample.append(np.mean(np.repeat(difference, repeats)))
    return np.quantile(sample, [0.025, 0.975])


@pytest.mark.parametrize("metric", statistics.METRICS)
def test_bootstrap_equals_the_literal_one(metric):
    y, a0 = _predictions(1, n=37)
    a = np.stack([a0, np.random.default_rng(2).permutation(a0)])
    b = np.stack([np.where(np.arange(37) % 3 == 0, y, row) for row in a])
    groups = np.arange(37) // 5
    found = statistics.paired_bootstrap(
        y, a, b, groups, labels=4, metric=metric, n_boot=150, rng=np.random.default_rng(3)
    )
    expected = _literal_bootstrap(y, a, b, groups, 4, metric, 150, np.random.default_rng(3))
    np.testing.assert_allclose([found.low, found.high], expected, atol=1e-12)
    assert found.n_groups == 8


def test_bootstrap_does_not_depend_on_order_or_on_names_of_patients():
    y, a = _predictions(4)
    _, b = _predictions(5)
    groups = np.arange(60) // 6
    order = np.random.default_rng(6).permutation(60)
    kwargs = dict(labels=4, metric="macro_f1", n_boot=100)
    one = statistics.paired_bootstrap(y, a, b, groups, rng=np.random.default_rng(7), **kwargs)
    two = statistics.paired_bootstrap(
        y[order], a[order], b[order], [f"p{g}" for g in groups[order]],
        rng=np.random.default_rng(7), **kwargs,
    )  # fmt: skip
    assert one == two


def test_swapping_the_methods_flips_the_sign():
    y, a = _predictions(8)
    b = y.copy()
    groups = np.arange(60) // 4
    kwargs = dict(labels=4, n_boot=200)
    ab = statistics.paired_bootstrap(y, a, b, groups, rng=np.random.default_rng(0), **kwargs)
    ba = statistics.paired_bootstrap(y, b, a, groups, rng=np.random.default_rng(0), **kwargs)
    assert ab.difference == pytest.approx(-ba.difference)
    assert (ab.low, ab.high) == pytest.approx((-ba.high, -ba.low))
    assert ab.p == ba.p < 0.05


def test_interval_covers_the_truth_and_resampling_images_would_not():
    """Images of a patient are right or wrong together; both methods are equally good."""
    rng = np.random.default_rng(9)
    n_groups, n_each, trials = 30, 10, 200
    by_patient = by_image = 0
    y = np.zeros(n_groups * n_each, int)
    groups = np.repeat(np.arange(n_groups), n_each)
    for _ in range(trials):
        a, b = (np.repeat(rng.random(n_groups) < 0.3, n_each).astype(int) for _ in range(2))
        kwargs = dict(labels=2, n_boot=200, rng=rng)
        c = statistics.paired_bootstrap(y, a, b, groups, **kwargs)
        by_patient += c.low <= 0 <= c.high
        c = statistics.paired_bootstrap(y, a, b, np.arange(y.size), **kwargs)
        by_image += c.low <= 0 <= c.high
    assert 0.88 <= by_patient / trials <= 1.0
    assert by_image / trials < 0.75


@pytest.mark.parametrize("metric", statistics.METRICS)
def test_p_is_that_of_all_swaps(metric, monkeypatch):
    """With five patients there are 32 ways to swap; here they are gone through one by one."""
    y, a = _predictions(11)
    b = np.where(np.random.default_rng(12).random(60) < 0.3, y, _predictions(13)[1])
    a, b = np.stack([a, a[::-1]]), np.stack([b, a])
    groups = np.arange(60) // 12

    def gain(first, second):
        both = zip(first, second, strict=True)
        each = [statistics.scores(y, v, 4)[metric] - statistics.scores(y, u, 4)[metric]
                for u, v in both]  # fmt: skip
        return np.mean(each)

    null = []
    for swap in itertools.product([False, True], repeat=5):
        at = np.array(swap)[groups]
        null.append(gain(np.where(at, b, a), np.where(at, a, b)))
    exact = np.mean(np.abs(null) >= abs(gain(a, b)) - 1e-12)
    given = {"labels": 4, "metric": metric}
    for n_boot in (1, 50):
        found = statistics.paired_bootstrap(
            y, a, b, groups, n_boot=n_boot, rng=np.random.default_rng(0), **given
        )
        assert found.p == pytest.approx(exact, abs=1e-12) and found.p >= 2.0**-4
        assert statistics.least_p(5, n_boot) == 2.0**-4
    assert statistics.least_p(11, 50) == 2.0**-10 and statistics.least_p(30, 99) == 0.01
    monkeypatch.setattr(statistics, "_ALL_SWAPS", 1)  # random ones, as where there are many more
    p = [
        statistics.paired_bootstrap(
            y, a, b, groups, n_boot=31, rng=np.random.default_rng(i), **given
        ).p
        for i in range(200)
    ]
    # One more than those drawn: (1 + 31 p) / 32 on average.
    error = np.sqrt(exact * (1 - exact) / 31 / 200)
    assert np.mean(p) == pytest.approx((1 + 31 * exact) / 32, abs=4 * error + 1e-12)


@pytest.mark.parametrize("n_groups", [2, 4, 10])
def test_few_patients_give_few_false_verdicts(n_groups):
    """Equally good methods; by the tail of the bootstrap 19 of 100 differed with four patients."""
    rng = np.random.default_rng(14)
    y, groups = np.zeros(12 * n_groups, int), np.repeat(np.arange(n_groups), 12)
    false = 0
    for _ in range(200):
        ease = rng.random(n_groups)[groups]
        a, b = ((rng.random(len(y)) > ease).astype(int) for _ in range(2))
        c = statistics.paired_bootstrap(y, a, b, groups, labels=2, n_boot=300, rng=rng)
        assert n_groups > 2 or c.p > 0.4
        false += statistics.verdict(c.difference, c.low, c.high, c.p) != "no difference"
    assert false <= 18  # 10 expected at most, 18 is the 99 % point of 200 draws at 0.05


def test_seeds_that_disagree_widen_the_interval():
    y = np.zeros(80, int)
    groups = np.arange(80) // 2
    wrong = np.arange(80) % 4 == 0
    a = np.stack([np.zeros(80, int)] * 2)
    agree = np.stack([wrong, wrong]).astype(int)
    differ = np.stack([2 * wrong, 0 * wrong]).astype(int)
    kwargs = dict(labels=3, n_boot=400)
    one, two = (
        statistics.paired_bootstrap(y, a, b, groups, rng=np.random.default_rng(1), **kwargs)
        for b in (agree, differ)
    )
    assert one.high < 0 and two.difference == one.difference / 2
    assert two.high == 0 and two.low < -0.2  # both draws of the good seed, and of the bad one
    with pytest.raises(ValueError, match="1 and 2 training seeds"):
        statistics.paired_bootstrap(y, a[0], agree, groups, rng=np.random.default_rng(1), **kwargs)


def test_same_predictions_differ_by_nothing():
    y, a = _predictions(10)
    c = statistics.paired_bootstrap(
        y, a, a, np.arange(60) // 6, labels=4, n_boot=50, rng=np.random.default_rng(0)
    )
    assert (c.difference, c.low, c.high, c.p) == (0, 0, 0, 1)
    assert statistics.verdict(c.difference, c.low, c.high, c.p) == "no difference"


def test_random_swaps_of_equal_methods_give_a_p_of_one():
    y = np.arange(60) % 4
    c = statistics.paired_bootstrap(
        y, y, y, np.arange(60) // 3, labels=4, n_boot=50, rng=np.random.default_rng(0)
    )  # 20 patients: more swaps than are gone through
    assert c.p == 1


def test_holm_by_hand():
    np.testing.assert_allclose(statistics.holm([0.01, 0.04, 0.03, 0.005]), [0.03, 0.06, 0.06, 0.02])
    assert statistics.holm([]).size == 0


def test_verdicts():
    assert statistics.verdict(0.1, 0.02, 0.2, 0.01) == "better"
    assert statistics.verdict(-0.1, -0.2, -0.02, 0.01) == "worse"
    assert statistics.verdict(0.1, 0.02, 0.2, 0.2) == "no difference"


def test_a_verdict_needs_the_interval_too():
    assert statistics.verdict(0.1, -0.02, 0.2, 0.01) == "no difference"
    assert statistics.verdict(0.1, 0.02, 0.2, 0.05) == "no difference"  # below the level, not at it
    assert statistics.verdict(0.1, 0.0, 0.2, 0.01) == "no difference"  # nor at the interval's end
    assert statistics.verdict(-0.1, -0.2, 0.0, 0.01) == "no difference"


def test_bad_input():
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match=r"outside 0 \.\. 2"):
        statistics.scores([0, 3], [0, 1], 3)
    with pytest.raises(ValueError, match="not among the labels"):
        statistics.scores(["a", "z"], ["a", "a"], ["a", "b"])
    with pytest.raises(ValueError, match="one prediction an image"):
        statistics.scores([0, 1], [0, 1, 1], 2)
    with pytest.raises(ValueError, match="empty"):
        statistics.scores(np.array([], int), np.array([], int), 2)
    with pytest.raises(ValueError, match="at least two"):
        statistics.paired_bootstrap([0, 1], [0, 1], [0, 1], ["p", "p"], labels=2, rng=rng)
    with pytest.raises(ValueError, match="one prediction and one patient for each image"):
        statistics.paired_bootstrap([0, 1], [0, 1], [0, 1], ["p", "q", "p"], labels=2, rng=rng)
    with pytest.raises(ValueError, match="choose one of"):
        statistics.paired_bootstrap([0], [0], [0], [0], labels=2, metric="auc", rng=rng)
    with pytest.raises(ValueError, match="positive baselines"):
        statistics.average_relative_gain({"kappa": 0.1}, {"kappa": 0.0})
    for one, other in (({}, {}), ({"kappa": 0.1}, {"accuracy": 0.1})):
        with pytest.raises(ValueError, match="give the same ones, at least one"):
            statistics.average_relative_gain(one, other)
    with pytest.raises(ValueError, match="lie in"):
        statistics.holm([0.5, 1.2])


def test_resampling_agrees_with_a_literal_bootstrap():
    """Groups drawn one after the other, and all of their samples counted."""
    rng = np.random.default_rng(0)
    groups = np.array(list("aabbbcddddee"))
    values = rng.normal(size=len(groups))
    found = statistics.resampled(
        lambda w: np.average(values, weights=w), groups, n_boot=4000, rng=np.random.default_rng(1)
    )
    names, means = np.unique(groups), []
    for _ in range(4000):
        drawn = rng.choice(names, len(names))
        means.append(np.mean(np.concatenate([values[groups == g] for g in drawn])))
    assert found[0] == pytest.approx(values.mean())
    np.testing.assert_allclose(found[1:], np.quantile(means, [0.025, 0.975]), atol=0.03)


def test_sets_of_samples_are_resampled_by_the_same_groups():
    """A measure of two sets that are the same is 0 in every draw; without a value none counts."""
    one, other = np.array(list("abcabc")), np.array(list("cba"))

    def difference(w, v):
        counts = [w[one == g].mean() - v[other == g].mean() for g in "abc"]
        return float(np.abs(counts).sum())

    drawn = np.random.default_rng(0)
    assert statistics.resampled(difference, one, other, n_boot=50, rng=drawn) == (0, 0, 0)
    gaps = statistics.resampled(
        lambda w: np.nan if w[0] == 0 else w[0], one, n_boot=200, rng=np.random.default_rng(0)
    )
    assert gaps[1] >= 1


def test_resampling_refuses_one_group_and_wrong_numbers():
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match="1 group: resampling needs at least two"):
        statistics.resampled(np.mean, ["a", "a"], rng=rng)
    with pytest.raises(ValueError, match=r"n_boot is 0 and level 0\.9"):
        statistics.resampled(np.mean, ["a", "b"], n_boot=0, level=0.9, rng=rng)
    with pytest.raises(ValueError, match="level 95"):
        statistics.resampled(np.mean, ["a", "b"], level=95, rng=rng)


def test_the_jackknife_of_a_mean_is_its_standard_error():
    """In closed form, for samples of an image each, and the same whatever the images are called."""
    values = np.random.default_rng(3).normal(2, 5, 13)
    shows = [{f"im{i}"} for i in range(13)]

    def mean(w):
        return np.average(values, weights=w)

    found = statistics.jackknife(mean, shows)
    reach = stats.t.ppf(0.975, 12) * values.std(ddof=1) / np.sqrt(13)
    np.testing.assert_allclose(found, values.mean() + np.array([0, -reach, reach]), rtol=1e-3)
    assert statistics.jackknife(mean, [{str(i), f"again {i}"} for i in range(13)])[0] == found[0]
    narrow = statistics.jackknife(mean, shows, level=0.5)
    assert found[1] < narrow[1] < narrow[0] < narrow[2] < found[2]


def test_the_jackknife_takes_all_samples_that_show_an_image():
    """In closed form: of a difference of means, the influence of an image is a sum over both."""
    x, y = np.array([1.0, 4.0, 2.0, 8.0]), np.array([3.0, 5.0, 7.0])
    shows = [{"a"}, {"b"}, {"c"}, {"c"}], [{"a", "b"}, {"b", "c"}, {"a", "c"}]

    def gap(w, v):
        return np.average(x, weights=w) - np.average(y, weights=v)

    of_x, of_y = (x - x.mean()) / 4, (y - y.mean()) / 3
    influence = [
        sum(u for u, own in zip(of_x, shows[0], strict=True) if name in own)
        - sum(u for u, own in zip(of_y, shows[1], strict=True) if name in own)
        for name in "abc"
    ]
    error = np.sqrt(3 / 2 * np.square(influence).sum())
    value, low, high = statistics.jackknife(gap, *shows)
    assert value == x.mean() - y.mean()
    assert high - value == pytest.approx(stats.t.ppf(0.975, 2) * error, rel=1e-3)
    assert value - low == pytest.approx(high - value)


def test_the_jackknife_refuses_one_image_and_a_wrong_level():
    with pytest.raises(ValueError, match="1 image: an interval needs at least two"):
        statistics.jackknife(np.mean, [{"a"}, {"a"}])
    with pytest.raises(ValueError, match="level is 95"):
        statistics.jackknife(np.mean, [{"a"}, {"b"}], level=95)


def test_the_interval_of_a_difference_of_kernel_distances_covers_zero():
    """Crops that share images: resampling targets alone leaves out zero in one case of five."""
    inside = 0
    for seed in range(20):
        rng = np.random.default_rng(seed)
        of_image = 0.7 * rng.normal(size=(12, 8))
        own, target = np.arange(12).repeat(6), rng.integers(0, 12, 10).repeat(4)
        source = rng.integers(0, 12, len(target))
        x, y = (of_image[i] + 0.7 * rng.normal(size=(len(i), 8)) for i in (own, source))
        shows = [{i} for i in own], [{i, j} for i, j in zip(target, source, strict=True)]
        change = quality.kid_difference(x, y + 0.1, y - 0.1, origins=shows)
        _, low, high = statistics.jackknife(change, *shows)
        inside += low <= 0 <= high
    assert inside >= 18


@pytest.mark.parametrize("patients", [3, 8])
def test_a_draw_without_a_class_says_nothing_of_its_f1(patients):
    """Macro F1 of a draw is the mean over the classes that it has; of all patients, over all."""
    rng = np.random.default_rng(patients)
    grade = np.arange(patients) % 3  # a grade each
    groups, y = np.arange(patients).repeat(5), grade.repeat(5)
    a, b = (np.where(rng.random(len(y)) < right, y, (y + 1) % 3) for right in (0.5, 0.8))
    tables = [statistics._by_group(y, guess, groups, patients, 3) for guess in (a, b)]
    draws = statistics._draw(patients, 40, rng)
    found = statistics._difference(*tables, draws, "macro_f1")
    for draw, value in zip(draws, found, strict=True):
        rows = np.repeat(np.arange(len(y)), draw[groups])
        f1 = [f1_score(y[rows], guess[rows], labels=np.unique(y[rows]), average=None)
              for guess in (a, b)]  # fmt: skip
        assert value == pytest.approx(np.mean(f1[1] - f1[0]))
    whole = statistics._difference(*tables, np.ones((1, patients), int), "macro_f1")[0]
    of_scores = [statistics.scores(y, guess, 3)["macro_f1"] for guess in (a, b)]
    assert whole == pytest.approx(of_scores[1] - of_scores[0])


def test_an_image_without_a_patient_is_refused():
    y = np.array([0, 1, 0, 1])
    for groups in (np.array([1.0, 2.0, np.nan, np.nan]), np.array(["a", "b", None, "c"], object)):
        with pytest.raises(ValueError, match="images have no patient"):
            statistics.paired_bootstrap(
                y, y, y, groups, labels=2, n_boot=10, rng=np.random.default_rng(0)
            )


def test_a_change_is_told_with_its_signs():
    assert statistics.in_words((0.25, -0.04, 1.0), 1) == "+0.2 (-0.0 to +1.0)"
    assert statistics.in_words((-0.0123, -0.1, 0.0), 3) == "-0.012 (-0.100 to +0.000)"
