import json
from dataclasses import replace

import mpmath
import numpy as np
import pytest
from scipy import stats

from helpers import draws
from helpers import replacement as rep
from helpers.draws import CompositeError, Sampler
from tests.test_replacement import toy_pool


def exact(f_t, f_j, w):
    """Eq. 1 with 60 digits."""
    mpmath.mp.dps = 60
    exponents = []
    for f, weight in zip(f_j, w, strict=True):
        squares = [
            (mpmath.mpf(float(a)) - mpmath.mpf(float(b))) ** 2 for a, b in zip(f_t, f, strict=True)
        ]
        exponents.append(-mpmath.mpf(float(weight)) * mpmath.sqrt(mpmath.fsum(squares)))
    largest = max(exponents)
    total = largest + mpmath.log(mpmath.fsum([mpmath.exp(e - largest) for e in exponents]))
    return np.array([float(e - total) for e in exponents])


# --- Eq. 1 ---


@pytest.mark.parametrize("scale", [1e-160, 1e-8, 1.0, 30.0, 1e6, 1e150, 1e200])
@pytest.mark.parametrize("offset", [0.0, 1e3])
def test_probabilities_against_sixty_digits(scale, offset):
    rng = np.random.default_rng(3)
    f_t = rng.normal(size=5) * scale + offset
    f_j = rng.normal(size=(9, 5)) * scale + offset
    w = 1.0 + rng.integers(0, 4, 9)
    np.testing.assert_allclose(
        draws.draw_log_probabilities(f_t, f_j, w), exact(f_t, f_j, w), rtol=1e-9, atol=1e-12
    )


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_distances_are_double_precision_in_any_chunk(dtype):
    rng = np.random.default_rng(0)
    f = (rng.normal(size=(50, 7)) * 10 + 1000).astype(dtype)
    expected = np.linalg.norm(f.astype(float) - f[3].astype(float), axis=1)
    for chunk in (1, 7, 50, 1024):
        np.testing.assert_allclose(
            draws.feature_distances(f[3], f, chunk=chunk), expected, rtol=1e-14
        )
    assert draws.feature_distances(f[0], f[:0]).shape == (0,)


def test_excluded_candidates_get_nothing_and_the_rest_sums_to_one():
    rng = np.random.default_rng(0)
    f, w = rng.normal(size=(8, 3)), np.ones(8)
    allowed = np.arange(8) % 2 == 0
    log_p = draws.draw_log_probabilities(f[0], f, w, allowed=allowed)
    assert (log_p[~allowed] == -np.inf).all()
    np.testing.assert_allclose(log_p[allowed], exact(f[0], f[allowed], w[allowed]), atol=1e-12)
    assert np.exp(log_p).sum() == pytest.approx(1, abs=1e-12)


def test_probabilities_do_not_depend_on_order_or_on_a_common_shift():
    rng = np.random.default_rng(1)
    f, w, order = rng.normal(size=(20, 6)), 1 + rng.random(20), rng.permutation(20)
    log_p = draws.draw_log_probabilities(f[4], f, w)
    np.testing.assert_allclose(
        draws.draw_log_probabilities(f[4], f[order], w[order]), log_p[order], atol=1e-12
    )
    np.testing.assert_allclose(draws.draw_log_probabilities(f[4] + 5, f + 5, w), log_p, atol=1e-9)


@pytest.mark.parametrize(
    ("f_t", "f_j", "w", "allowed", "message"),
    [
        (np.zeros(3), np.zeros((4, 2)), np.ones(4), None, "shapes disagree"),
        (np.zeros(2), np.zeros((4, 2)), np.ones(3), None, "shapes disagree"),
        (np.zeros(2), np.zeros((4, 2)), np.ones(4), np.zeros(4, bool), "no candidate"),
        (np.zeros(2), np.zeros((0, 2)), np.ones(0), None, "no candidate"),
        (np.zeros(2), np.full((4, 2), np.nan), np.ones(4), None, "NaN"),
    ],
)
def test_probability_errors(f_t, f_j, w, allowed, message):
    with pytest.raises(ValueError, match=message):
        draws.draw_log_probabilities(f_t, f_j, w, allowed=allowed)


@pytest.mark.parametrize("size_range", [(0, np.inf), (0.7, 1.4), (0, 1), (0.9, np.inf)])
def test_draws_have_the_probabilities_of_eq_1(size_range):
    pool, _ = toy_pool(p=2)
    sampler = Sampler(pool, penalty=0)
    rows, log_p = sampler.log_probabilities(0, size_range=size_range)
    relative = pool.table["area"].to_numpy()[rows] / pool.table["area"].iat[0]
    expected = sampler.allowed(0, rows) & (relative >= size_range[0]) & (relative <= size_range[1])
    possible = np.isfinite(log_p)
    np.testing.assert_array_equal(possible, expected)
    assert possible.sum() > 1
    np.testing.assert_allclose(
        log_p[possible],
        exact(pool.features[0], pool.features[rows[possible]], np.ones(possible.sum())),
        atol=1e-9,
    )
    rng = np.random.default_rng(0)
    n = 10_000
    drawn = [sampler.draw(0, rng, size_range=size_range) for _ in range(n)]
    drawn = np.bincount(drawn, minlength=len(pool))[rows]
    assert (drawn[~possible] == 0).all()
    expected = n * np.exp(log_p[possible])
    assert stats.chisquare(drawn[possible], expected * n / expected.sum()).pvalue > 1e-3


def test_areas_at_the_ends_of_the_range_may_be_drawn():
    pool, _ = toy_pool(6, 4, classes=("a",))
    pool.table["area"] = np.where(np.arange(24) == 0, 100, np.arange(24) * 10)
    rows, log_p = Sampler(pool).log_probabilities(0, size_range=(0.5, 1.5))
    assert rows[np.isfinite(log_p)].tolist() == list(range(5, 16))


def test_two_draws_in_a_row_follow_the_raised_weight():
    """Joint distribution of the first two draws, the penalty of the first included."""
    pool, _ = toy_pool(4, 3, p=2)
    rows, log_p = Sampler(pool).log_probabilities(0)
    possible = rows[np.isfinite(log_p)]
    expected = {}
    for first in possible:
        sampler = Sampler(pool)
        sampler.w[first] += 1
        _, second = sampler.log_probabilities(0)
        for row, q in zip(rows, second, strict=True):
            if np.isfinite(q):
                expected[int(first), int(row)] = np.exp(log_p[rows == first][0] + q)
    assert sum(expected.values()) == pytest.approx(1)
    rng, n, seen = np.random.default_rng(7), 4_000, dict.fromkeys(expected, 0)
    sampler = Sampler(pool)
    for _ in range(n):
        pair = sampler.draw(0, rng), sampler.draw(0, rng)
        seen[pair] += 1
        for row in pair:
            sampler.undo(row)
    pairs = list(expected)
    result = stats.chisquare([seen[k] for k in pairs], [n * expected[k] for k in pairs])
    assert result.pvalue > 1e-3


# --- sampler ---


def cut_pool(*args, **kwargs):
    """A toy pool in which segments reach sides of their images at random, and most are cut."""
    pool, _ = toy_pool(*args, **kwargs)
    rng = np.random.default_rng(4)
    for i in range(len(pool)):
        left, top, right, bottom = rng.random(4) < 0.35
        x, y = 0 if left else 30, 0 if top else 20
        pool.table.loc[i, ["x", "y"]] = x, y
        pool.table.loc[i, ["w", "h"]] = 96 - x if right else 15, 96 - y if bottom else 25
        pool.table.loc[i, "border"] = rng.random() < 0.8
    return pool


def fits_at_border(t, row, target):
    """A quarter turn or mirror image exists that carries the sides of one onto the other's."""

    def sides(i):
        x, y, w, h = t.loc[i, ["x", "y", "w", "h"]]
        return [x == 0, y == 0, x + w == 96, y + h == 96]

    if not t["border"][row]:
        return True
    cut, offered = sides(row), sides(target)
    if not (t["border"][target] and any(cut)) or cut[0] & cut[2] or cut[1] & cut[3]:
        return False
    turned = [
        [cut[(k * sign + turn) % 4] for k in range(4)] for turn in range(4) for sign in (1, -1)
    ]
    return any(all(o or not c for c, o in zip(each, offered, strict=True)) for each in turned)


@pytest.mark.parametrize("own_image", [True, False])
@pytest.mark.parametrize("own_patient", [True, False])
@pytest.mark.parametrize("cut_sources", draws.CUT_SOURCES)
def test_who_may_be_drawn(own_image, own_patient, cut_sources):
    pool = cut_pool(8, 4)
    sampler = Sampler(
        pool, exclude_own_image=own_image, exclude_own_patient=own_patient,
        cut_sources=cut_sources,
    )  # fmt: skip
    t = pool.table
    for target in range(len(pool)):
        rows, log_p = sampler.log_probabilities(target)
        assert set(rows) == set(np.flatnonzero(t["label"] == t["label"][target]))
        for row, q in zip(rows, log_p, strict=True):
            out = (
                row == target
                or (own_image and t["image_id"][row] == t["image_id"][target])
                or (own_patient and t["patient"][row] == t["patient"][target])
                or (cut_sources == "refuse" and t["border"][row])
                or (cut_sources == "at_border" and not fits_at_border(t, row, target))
            )
            assert (q == -np.inf) == out


def drawable(sampler, target):
    rows, log_p = sampler.log_probabilities(target)
    return rows[np.isfinite(log_p)].tolist()


def test_only_the_known_patient_of_the_same_data_set_is_left_out_of_draws():
    pool, _ = toy_pool(12, 3, classes=("a",))
    pool.table["patient"] = ["p0"] * 9 + ["p1"] * 9 + [""] * 18
    pool.table["dataset"] = ["one"] * 6 + ["two"] * 3 + ["one"] * 27
    sampler = Sampler(pool, exclude_own_patient=True, cut_sources="anywhere")
    assert drawable(sampler, 0) == list(range(6, 36))  # p0 of data set two is another patient
    assert drawable(sampler, 18) == [*range(18), *range(21, 36)]  # unknown: its own image alone
    for target in (0, 18):
        np.testing.assert_array_equal(
            np.flatnonzero(sampler.allowed(target, np.arange(36))), drawable(sampler, target)
        )


@pytest.mark.parametrize("own_image", [True, False])
@pytest.mark.parametrize("own_patient", [True, False])
@pytest.mark.parametrize("cut_sources", draws.CUT_SOURCES)
def test_targets_and_sources_are_those_with_a_partner(own_image, own_patient, cut_sources):
    pool = cut_pool(7, 2, classes=("a", "b", "c"))
    pool.table.loc[pool.table["image_id"] == "im4", "patient"] = ""
    sampler = Sampler(
        pool, exclude_own_image=own_image, exclude_own_patient=own_patient,
        cut_sources=cut_sources,
    )  # fmt: skip
    labels = pool.table["label"]
    pairs = np.array([sampler.allowed(i, np.arange(len(pool))) for i in range(len(pool))])
    pairs &= labels.to_numpy()[:, None] == labels.to_numpy()
    np.testing.assert_array_equal(sampler.sources(), np.flatnonzero(pairs.any(axis=0)))
    expected = np.flatnonzero(pairs.any(axis=1))
    if len(expected):
        np.testing.assert_array_equal(sampler.targets(), expected)
    else:
        with pytest.raises(CompositeError, match="may be replaced"):
            sampler.targets()


def test_a_pool_cut_by_the_border_says_so():
    pool, _ = toy_pool(4, 3)
    pool.table["border"] = True
    with pytest.raises(CompositeError, match=r"12 are cut by the border.*cut_sources refuse"):
        Sampler(pool, cut_sources="refuse").targets()


def test_unknown_patients_exclude_nothing():
    pool, _ = toy_pool(4, 3)
    pool.table["patient"] = ""
    sampler = Sampler(pool, exclude_own_patient=True)
    assert sampler.allowed(0, np.array([6, 7])).all()


def test_weights_rise_and_spread_the_draws():
    pool, _ = toy_pool(12, 6)
    rng = np.random.default_rng(0)
    plain, penalised = Sampler(pool, penalty=0), Sampler(pool)
    for _ in range(300):
        plain.draw(0, rng)
        penalised.draw(0, rng)
    np.testing.assert_array_equal(penalised.w, 1 + penalised.counts)
    assert penalised.counts.sum() == plain.counts.sum() == 300 and (plain.w == 1).all()
    more = draws.effective_sources(penalised.counts), draws.effective_sources(plain.counts)
    assert more[0] > 1.2 * more[1]


def test_state_continues_a_run_exactly():
    pool, _ = toy_pool()
    whole, first = Sampler(pool), Sampler(pool)
    rng = np.random.default_rng(5)
    expected = [whole.draw(t, rng) for t in (0, 5, 10, 0, 1, 20)]
    rng = np.random.default_rng(5)
    got = [first.draw(t, rng) for t in (0, 5, 10)]
    state = json.loads(json.dumps(first.state()))
    second = Sampler(pool).restore(state)
    got += [second.draw(t, rng) for t in (0, 1, 20)]
    assert got == expected
    np.testing.assert_array_equal(second.w, whole.w)
    with pytest.raises(ValueError, match="another pool"):
        Sampler(toy_pool(seed=1)[0]).restore(state)


def test_a_state_takes_the_place_of_what_was_drawn_before():
    pool, _ = toy_pool()
    rng = np.random.default_rng(0)
    first, second = Sampler(pool), Sampler(pool)
    first.draw(0, rng)
    for target in (0, 5, 10, 20):
        second.draw(target, rng)
    second.restore(first.state())
    np.testing.assert_array_equal(second.w, first.w)
    np.testing.assert_array_equal(second.counts, first.counts)


def test_what_was_tried_before_is_left_out_and_the_rest_keeps_its_odds():
    """First of those that fit in draws without replacement: Eq. 1 among those that fit."""
    pool, _ = toy_pool(p=2)
    sampler = Sampler(pool, penalty=0)
    rows, log_p = sampler.log_probabilities(0)
    possible = rows[np.isfinite(log_p)]
    fitting = possible[1::2]
    rng, n, found = np.random.default_rng(0), 4000, []
    for _ in range(n):
        tried = []
        while not tried or tried[-1] not in fitting:
            tried.append(sampler.draw(0, rng, without=tried))
            sampler.undo(tried[-1])
        assert len(set(tried)) == len(tried)
        found.append(tried[-1])
    p = np.exp(log_p[np.isin(rows, fitting)])
    counts = [found.count(row) for row in fitting]
    assert stats.chisquare(counts, n * p / p.sum()).pvalue > 1e-3
    with pytest.raises(CompositeError, match="no segment may replace"):
        sampler.draw(0, rng, without=possible.tolist())


def test_undo():
    pool, _ = toy_pool()
    sampler = Sampler(pool)
    sampler.undo(sampler.draw(0, np.random.default_rng(0)))
    assert (sampler.w == 1).all() and (sampler.counts == 0).all()


def test_nobody_left_is_a_clear_error():
    pool, images = toy_pool(2, 3)  # one image a class
    sampler = Sampler(pool)
    with pytest.raises(CompositeError, match="exclude_own_image, cut_sources at_border"):
        sampler.draw(0, np.random.default_rng(0))
    with pytest.raises(CompositeError, match="'im0'"):
        rep.compose(images["im0"], "im0", pool, sampler, images.get, rng=np.random.default_rng(0))
    with pytest.raises(CompositeError, match="an area of 90 to inf times its own"):
        sampler = Sampler(pool, exclude_own_image=False)
        sampler.draw(0, np.random.default_rng(0), size_range=(90, np.inf))
    assert Sampler(pool, exclude_own_image=False).draw(0, np.random.default_rng(0)) in (1, 2)
    single, _ = toy_pool(1, 1)
    with pytest.raises(CompositeError, match="the only one of class 'a'; add images of this class"):
        Sampler(single).draw(0, np.random.default_rng(0))
    with pytest.raises(ValueError, match="cut_sources='never' is unknown: use one of at_border"):
        Sampler(pool, cut_sources="never")
    for penalty in (-1, np.nan, np.inf):
        with pytest.raises(ValueError, match=f"penalty={penalty}"):
            Sampler(pool, penalty=penalty)


def test_effective_sources():
    assert draws.effective_sources(np.array([4, 4, 4, 0])) == pytest.approx(3)
    assert draws.effective_sources(np.array([9, 0])) == pytest.approx(1)
    assert draws.effective_sources(np.zeros(3)) == 0


# --- draws by bounds ------------------------------------------------------------------------------


def sampler_of(features, **options):
    """Sampler of a pool of one class with these very features."""
    pool, _ = toy_pool(len(features) // 5, 5, classes=("a",))
    return Sampler(replace(pool, features=np.asarray(features, np.float32)), **options)


@pytest.mark.parametrize("scale", [1e-30, 1e-3, 1.0, 40.0, 1e4, 1e15])
@pytest.mark.parametrize("p", [1, 7, 128])
def test_the_bound_never_exceeds_the_distance(scale, p):
    """Also for duplicates and near-duplicates, where squares cancel."""
    rng = np.random.default_rng(p)
    f = rng.normal(size=(60, p)) * scale
    f[20:40] = f[0] * (1 + rng.normal(size=(20, 1)) * 1e-6)
    f[40:45] = f[0]
    sampler = sampler_of(f)
    block = sampler._blocks["a"]
    low = block.nearest_possible(block.features[0]).astype(float)
    exact_ones = draws.feature_distances(block.features[0], block.features)
    assert (low <= exact_ones * (1 + 1e-6)).all()
    if scale > 1e-18:  # below, squares leave single precision, and the bound is zero
        far = exact_ones > 0.3 * scale * np.sqrt(p)
        assert (low[far] > 0.99 * exact_ones[far]).all()


@pytest.mark.parametrize("scale", [1e-25, 0.01, 3.0, 100.0, 1e6, 1e25])
def test_draws_at_any_scale_have_the_probabilities_of_eq_1(scale):
    """Duplicates of the target and of each other included; penalty weights uneven."""
    rng = np.random.default_rng(8)
    f = rng.normal(size=(30, 6))
    f[10], f[11] = f[0], f[20]
    # Distances of a few units apart whatever the scale, so that several candidates are likely.
    f = f * min(scale, 1.0) + (0 if scale <= 1 else np.r_[scale, np.zeros(5)])
    sampler = sampler_of(f, penalty=0)
    sampler.w[:] = 1 + rng.integers(0, 3, 30)
    rows, log_p = sampler.log_probabilities(0)
    n = 1_500
    drawn = np.bincount([sampler.draw(0, rng) for _ in range(n)], minlength=30)[rows]
    expected = n * np.exp(log_p)
    assert (drawn[expected == 0] == 0).all()
    rare = expected < 5
    seen = np.append(drawn[~rare], drawn[rare].sum())
    hoped = np.append(expected[~rare], expected[rare].sum())
    keep = hoped > 0
    assert stats.chisquare(seen[keep], hoped[keep] * n / hoped[keep].sum()).pvalue > 1e-3


def test_single_precision_alone_would_draw_wrongly():
    """Far from the origin, squared norms cancel: the plain product form loses the distances."""
    f = np.zeros((30, 4), np.float32)
    f[:, 0] = 3e4
    f[:, 1] = np.arange(30) * 0.05
    sampler = sampler_of(f, penalty=0, exclude_own_image=False)
    squares = (f**2).sum(1)
    plain = np.sqrt(np.maximum(squares + squares[0] - 2 * f @ f[0], 0))
    _, log_p = sampler.log_probabilities(0)
    wrong = np.exp(-plain[1:]) / np.exp(-plain[1:]).sum()
    assert np.abs(wrong - np.exp(log_p[1:])).max() > 0.01
    rng, n = np.random.default_rng(0), 5_000
    drawn = np.bincount([sampler.draw(0, rng) for _ in range(n)], minlength=30)[1:]
    assert stats.chisquare(drawn, n * np.exp(log_p[1:])).pvalue > 1e-3


def test_a_draw_that_single_precision_cannot_tell_falls_back_to_the_formula(monkeypatch):
    f = np.random.default_rng(0).normal(size=(20, 3)) * 1e12
    sampler, calls = sampler_of(f), []
    whole = sampler.log_probabilities
    monkeypatch.setattr(
        sampler, "log_probabilities", lambda t, **options: calls.append(t) or whole(t, **options)
    )
    rows, log_p = whole(0)
    assert sampler.draw(0, np.random.default_rng(0)) == rows[log_p.argmax()]
    small = sampler_of(f / 1e12)
    monkeypatch.setattr(small, "log_probabilities", None)
    small.draw(0, np.random.default_rng(0))
    assert calls == [0]


def test_interrupted_run_with_random_targets_ends_with_the_same_weights():
    pool, _ = toy_pool(12, 6)
    whole = Sampler(pool)
    rng = np.random.default_rng(11)
    for _ in range(60):
        whole.draw(int(rng.integers(len(pool))), rng)
    rng, part = np.random.default_rng(11), Sampler(pool)
    for k in range(60):
        if k % 13 == 0:  # killed and taken up again, the generator's state with it
            state, position = json.dumps(part.state()), rng.bit_generator.state
            part, rng = Sampler(pool).restore(json.loads(state)), np.random.default_rng()
            rng.bit_generator.state = position
        part.draw(int(rng.integers(len(pool))), rng)
    np.testing.assert_array_equal(part.w, whole.w)
    np.testing.assert_array_equal(part.counts, whole.counts)


def test_restore_refuses_another_penalty_and_what_is_no_state():
    pool, _ = toy_pool()
    state = Sampler(pool).state()
    with pytest.raises(ValueError, match=r"give penalty=1\.0"):
        Sampler(pool, penalty=2).restore(state)
    with pytest.raises(ValueError, match=r"lacks .*penalty"):
        Sampler(pool).restore({k: v for k, v in state.items() if k != "penalty"})


def test_last_candidate_left_out_is_never_drawn():
    """The product of a random number and the total may round to the total."""

    class Ones:
        def random(self):
            return 1.0

    assert draws._invert_cumulative(np.array([0.2, 0.5, 1.0, 1.0, 1.0]), Ones()) == 2
