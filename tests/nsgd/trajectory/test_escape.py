"""Escape times against the exact chain of SGD on a grid, against quadrature, and against each other."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from scipy.interpolate import RegularGridInterpolator
from scipy.linalg import solve_discrete_lyapunov
from scipy.sparse.linalg import LinearOperator, gmres

from nsgd.trajectory.escape import (
    Escapes,
    energy_factor,
    escape_time,
    excess_loss,
    gibbs_mass,
    gibbs_mean,
    inertia,
    kramers_factor,
    laplace_mass,
    passage_time,
    simulate,
    temperature,
)
from nsgd.trajectory.escape.landscape import built_in_landscape, with_noise
from nsgd.trajectory.escape.potentials import Channel, DoubleWell
from nsgd.trajectory.escape.theory import predicted_stay, predicted_steps

WELL = DoubleWell(barrier=1.0, skew=0.3)
SHARP, FLAT = WELL.minima
FAR, BEYOND = -4.0, 8.0
LANDSCAPE = built_in_landscape("double-well", barrier=1.0, skew=0.3, walls=40.0)


def chain_steps(lr, heat, points=1501):
    """Exact mean steps of SGD from the sharp minimum to the flat one: (I - K) tau = 1 on a grid to its left."""
    grid = np.linspace(-2.5, FLAT, points, endpoint=False)
    spacing, spread = grid[1] - grid[0], math.sqrt(2 * lr * heat)
    means = grid - lr * WELL.gradient(torch.from_numpy(grid)).numpy()
    kernel = np.exp(-0.5 * ((grid[None] - means[:, None]) / spread) ** 2) * spacing / (spread * math.sqrt(2 * math.pi))
    times = np.linalg.solve(np.eye(points) - kernel, np.ones(points))
    return float(np.interp(SHARP, grid, times))


def heavy_ball_steps(lr, heat, beta, points=141):
    """The same with momentum, on a grid of pairs: where a walker was, and where it is."""
    grid = np.linspace(-2.3, FLAT, points, endpoint=False)
    spacing, spread = grid[1] - grid[0], math.sqrt(2 * lr * heat * (1 - beta))
    slopes = WELL.gradient(torch.from_numpy(grid)).numpy()
    means = grid[None] + beta * (grid[None] - grid[:, None]) - lr * slopes[None]  # (before, now)
    kernel = np.exp(-0.5 * ((grid - means[:, :, None]) / spread) ** 2) * spacing / (spread * math.sqrt(2 * math.pi))

    def less_what_follows(times):
        times = times.reshape(points, points)
        return (times - np.einsum("bna,na->bn", kernel, times)).ravel()

    system = LinearOperator((points**2, points**2), matvec=less_what_follows)
    times, failed = gmres(system, np.ones(points**2), rtol=1e-8, restart=100, maxiter=50)
    assert not failed
    return float(RegularGridInterpolator((grid, grid), times.reshape(points, points))([[SHARP, SHARP]])[0])


def passage(heat):
    return passage_time(WELL, start=SHARP, end=FLAT, far=FAR, temperature=heat)


def kramers(heat):
    return escape_time(
        barrier=WELL.barrier,
        temperature=heat,
        minimum=torch.tensor([WELL.curvature(SHARP)]),
        saddle=torch.tensor([WELL.curvature(0.0)]),
    )


# -- the potential -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("skew", [0.0, 0.3, 0.9])
def test_the_double_well_has_the_minima_and_curvatures_that_it_says(skew):
    well = DoubleWell(barrier=2.0, skew=skew)
    left, right = well.minima
    assert left < 0 < right
    for x, value in ((left, 0.0), (0.0, 2.0), (right, 0.0)):
        assert float(well(np.asarray(x))) == pytest.approx(value, abs=1e-12)
        t = torch.tensor(x, dtype=torch.float64, requires_grad=True)
        slope = well.gradient(t)
        assert slope.item() == pytest.approx(0, abs=1e-10)
        assert float(torch.autograd.grad(slope, t)[0]) == pytest.approx(well.curvature(x), rel=1e-9)
    assert well.curvature(left) >= well.curvature(right) > 0
    grid = np.linspace(-2, 3, 2001)
    np.testing.assert_allclose(
        np.gradient(well(grid), grid)[1:-1], well.gradient(torch.from_numpy(grid)).numpy()[1:-1], atol=2e-3
    )


def test_the_double_well_is_the_same_of_arrays_and_of_tensors():
    grid = np.linspace(-2, 3, 101)
    np.testing.assert_allclose(WELL(torch.from_numpy(grid)).numpy(), WELL(grid), rtol=1e-13, atol=1e-13)


def test_the_channel_has_the_gradient_and_the_hessians_that_it_says():
    channel = Channel(WELL, walls=40.0)
    points = torch.randn(50, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    (slope,) = torch.autograd.grad(channel(points).sum(), points)
    torch.testing.assert_close(channel.gradient(points), slope, rtol=1e-10, atol=1e-10)
    for x in (SHARP, 0.0, FLAT):
        point = torch.tensor([x, 0.0], dtype=torch.float64)
        hessian = torch.autograd.functional.hessian(lambda p: channel(p[None])[0], point)
        wanted = torch.tensor([WELL.curvature(x), float(channel.across(np.asarray(x)))], dtype=torch.float64)
        torch.testing.assert_close(hessian, torch.diag(wanted), rtol=1e-9, atol=1e-9)
    assert float(channel.across(np.asarray(0.0))) == 40
    assert channel.across(np.asarray(SHARP)) > 40 > channel.across(np.asarray(FLAT))


def test_the_marginal_of_the_channel_is_what_integrating_over_y_leaves():
    channel, heat = Channel(WELL, walls=40.0), 0.2
    xs, ys = np.linspace(-1.5, 2.0, 7), np.linspace(-2, 2, 4001)
    places = torch.from_numpy(np.stack(np.meshgrid(xs, ys, indexing="ij"), axis=-1).reshape(-1, 2))
    values = channel(places).numpy().reshape(len(xs), len(ys))
    weights = np.exp(-values / heat)
    wanted = -heat * np.log(weights.sum(1))
    found = channel.marginal(temperature=heat)(xs)
    np.testing.assert_allclose(found - found[0], wanted - wanted[0], atol=1e-9)
    means = (weights * values).sum(1) / weights.sum(1)
    np.testing.assert_allclose(channel.mean_loss(temperature=heat)(xs), means, rtol=1e-9)


def test_at_a_finite_rate_the_marginal_pushes_as_the_variance_of_discrete_sgd_does():
    """Its slope is the mean over y of that of f, with the mean y^2 of the iteration, T / (h (1 - rate h / 2))."""
    channel, heat, rate = Channel(WELL, walls=40.0), 0.2, 0.02
    for x in (SHARP, -0.3, 0.8):
        h, variance = float(channel.across(np.asarray(x))), 0.0
        for _ in range(2000):
            variance = (1 - rate * h) ** 2 * variance + 2 * rate * heat
        place = torch.tensor([[x, math.sqrt(variance)]], dtype=torch.float64)
        step = 1e-5
        ends = channel.marginal(temperature=heat, rate=rate)(np.array([x - step, x + step]))
        assert float(channel.gradient(place)[0, 0]) == pytest.approx((ends[1] - ends[0]) / (2 * step), rel=1e-6)
        mean = float(channel.mean_loss(temperature=heat, rate=rate)(np.array([x]))[0])
        assert float(channel(place)[0]) == pytest.approx(mean, rel=1e-9)


# -- times ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ratio", [10.0, 15.0, 25.0])
def test_kramers_agrees_with_quadrature_from_ten_temperatures_on(ratio):
    heat = WELL.barrier / ratio
    assert kramers(heat) == pytest.approx(passage(heat), rel=0.05)


def test_to_the_saddle_it_takes_half_as_long():
    ratios = []
    for heat in (1 / 20, 1 / 80, 1 / 320):
        saddle = passage_time(WELL, start=SHARP, end=0.0, far=FAR, temperature=heat)
        ratios.append(passage(heat) / saddle)
    assert ratios == sorted(ratios, reverse=True)  # of the order of the root of the temperature
    assert ratios[-1] == pytest.approx(2, rel=0.02)


def test_the_chain_tends_to_the_diffusion_as_the_rate_falls():
    heat = WELL.barrier / 4
    paces = (0.2, 0.1, 0.05, 0.025)  # lr h at the sharp minimum
    errors = []
    for pace in paces:
        lr = pace / WELL.curvature(SHARP)
        errors.append(abs(lr * chain_steps(lr, heat) / passage(heat) - 1))
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 0.02  # they differ there
    assert errors[-1] < 0.02


@pytest.mark.parametrize("gamma", [1.0, 0.5])
def test_simulated_sgd_takes_as_many_steps_as_the_exact_chain(gamma):
    lr, noise, batch_size = 0.2 / WELL.curvature(SHARP), 200.0 / gamma, 4  # as hot with gamma as without
    found = simulate(
        WELL.gradient,
        torch.full((4000, 1), SHARP, dtype=torch.float64),
        lambda x: x[:, 0] >= FLAT,
        lr=lr,
        noise=noise,
        batch_size=batch_size,
        steps=100_000,
        seed=1,
        scale=torch.tensor([gamma]),
    )
    assert found.reached == 1
    heat = temperature(lr=gamma * lr, noise=noise, batch_size=batch_size)
    spread = float(found.steps.double().std()) / math.sqrt(len(found.steps))
    assert found.mean == pytest.approx(float(found.steps.double().mean()), rel=1e-12)
    assert abs(found.mean - chain_steps(gamma * lr, heat)) < 3 * spread


@pytest.mark.parametrize(("beta", "lr", "within"), [(0.5, 0.02, 0.06), (0.5, 0.01, 0.03), (0.9, 0.01, 0.11)])
def test_escape_times_with_momentum_are_those_of_the_exact_chain(beta, lr, within):
    """Off by the rate alone, of which they are the limit; the rate alone says twice too short a time at 0.9."""
    heat = WELL.barrier / 4
    sgd = {"lr": lr, "noise": 1000.0, "batch_size": lr * 1000 / (2 * heat * (1 - beta)), "momentum": beta}
    assert temperature(**sgd) == pytest.approx(heat)
    exact, _ = predicted_steps(LANDSCAPE, sgd)
    wanted = heavy_ball_steps(lr, heat, beta)
    assert exact == pytest.approx(wanted, rel=within)
    walked = simulate(
        WELL.gradient,
        torch.full((2000, 1), SHARP, dtype=torch.float64),
        lambda x: x[:, 0] >= FLAT,
        steps=100_000,
        seed=2,
        **sgd,
    )
    assert walked.reached == 1
    assert abs(walked.mean - wanted) < 3 * walked.standard_error + 0.01 * wanted  # the grid's own error
    assert beta < 0.9 or passage(heat) * (1 - beta) / lr < wanted / 1.8


def test_walkers_that_keep_their_energy_take_as_long_as_predicted():
    """Where friction takes two temperatures a swing; with Kramers' factor alone a third too short."""
    lr, beta, heat = 0.002, 0.99, 0.25
    sgd = {"lr": lr, "noise": 1000.0, "batch_size": lr * 1000 / (2 * heat * (1 - beta)), "momentum": beta}
    start = torch.full((1500, 1), SHARP, dtype=torch.float64)
    walked = simulate(WELL.gradient, start, lambda x: x[:, 0] >= FLAT, steps=100_000, seed=1, **sgd)
    exact, _ = predicted_steps(LANDSCAPE, sgd)
    assert abs(walked.mean - exact) < 3 * walked.standard_error + 0.03 * exact
    energy = energy_factor(WELL, saddle=0.0, far=FAR, inertia=inertia(lr=lr, momentum=beta), temperature=heat)
    assert exact / energy < 0.75 * walked.mean


def test_the_factor_of_energy_is_the_integral_of_mel_nikov_and_meshkov():
    """Over a parabola, on which the area of a swing is that of half an ellipse, by SciPy's own quadrature."""
    curvature, depth, mass, heat = 8.0, 1.0, 5.0, 0.25
    reach = math.sqrt(2 * depth / curvature)  # the swing's half-width
    taken = 2 * math.sqrt(2 * depth / mass) * math.pi * reach / 2 / heat
    inside = quad(lambda x: math.log1p(-math.exp(-taken * (x * x + 0.25))) / (x * x + 0.25), -np.inf, np.inf)[0]
    found = energy_factor(lambda x: curvature * x**2 / 2, saddle=reach, far=-2.0, inertia=mass, temperature=heat)
    assert found == pytest.approx(math.exp(-inside / (2 * math.pi)), rel=1e-4)
    assert found > 1
    options = {"saddle": reach, "far": -2.0, "temperature": heat}
    assert energy_factor(lambda x: curvature * x**2 / 2, inertia=0.0, **options) == 1
    assert energy_factor(lambda x: curvature * x**2 / 2, inertia=1e-4, **options) == 1


def test_what_inertia_takes_at_the_saddle_is_what_the_root_of_its_motion_says():
    down, mass = 4.0, inertia(lr=0.02, momentum=0.9)
    assert mass == pytest.approx(0.02 * 0.9 / 0.1**2)
    growth = max(np.roots([mass, 1.0, -down]))
    assert kramers_factor(inertia=mass, saddle=torch.tensor([-down, 9.0])) == pytest.approx(down / growth)
    assert kramers_factor(inertia=0.0, saddle=torch.tensor([-down])) == 1
    with pytest.raises(ValueError, match="a saddle with a negative eigenvalue, got 9 as its least"):
        kramers_factor(inertia=1.0, saddle=torch.tensor([9.0]))


def test_with_momentum_nothing_is_predicted_of_noise_that_depends_on_the_position():
    noisy = with_noise(LANDSCAPE, "loss", floor=0.3)
    sgd = {"lr": 0.01, "noise": 100.0, "batch_size": 2.0}
    assert all(map(math.isfinite, predicted_steps(noisy, sgd)))
    moving = {**sgd, "momentum": 0.5}
    assert all(map(math.isnan, predicted_steps(noisy, moving)))
    assert all(math.isnan(value) for pair in predicted_stay(noisy, moving).values() for value in pair)


def test_kramers_in_two_dimensions_is_that_of_the_way_out_times_the_other():
    out = {"barrier": 1.0, "temperature": 0.1}
    one = escape_time(minimum=torch.tensor([3.0]), saddle=torch.tensor([-2.0]), **out)
    two = escape_time(minimum=torch.diag(torch.tensor([3.0, 5.0])), saddle=torch.tensor([20.0, -2.0]), **out)
    assert two == pytest.approx(one * math.sqrt(20 / 5), rel=1e-12)


# -- where the time is spent ---------------------------------------------------------------------------------


def test_mass_near_the_flat_minimum_tends_to_the_ratio_of_curvatures_at_every_batch_size():
    curvatures = torch.tensor([[WELL.curvature(SHARP)], [WELL.curvature(FLAT)]])
    errors = []
    for heat in (0.1, 0.03, 0.01):
        exact = gibbs_mass(WELL, edges=np.array([FAR, 0.0, BEYOND]), temperature=heat)
        laplace = laplace_mass(depths=torch.zeros(2), curvatures=curvatures, temperature=heat)
        assert float(exact.sum()) == pytest.approx(1)
        assert float(laplace[1] / laplace[0]) == pytest.approx(math.sqrt(curvatures[0, 0] / curvatures[1, 0]))
        errors.append(float((exact - laplace).abs().max()))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.01


def test_a_deeper_sharp_minimum_wins_when_it_is_cold():
    options = {"depths": torch.tensor([-0.1, 0.0]), "curvatures": torch.tensor([[100.0], [1.0]])}
    assert float(laplace_mass(temperature=1.0, **options)[0]) < 0.2
    assert float(laplace_mass(temperature=0.01, **options)[0]) > 0.99


def test_the_price_is_the_stationary_loss_of_discrete_sgd():
    curvatures, lr, noise, batch_size = torch.tensor([0.5, 3.0, 15.0]).double(), 0.1, 2.0, 8
    variances = torch.zeros(3, dtype=torch.float64)
    for _ in range(2000):
        variances = (1 - lr * curvatures) ** 2 * variances + lr**2 * noise / batch_size
    found = excess_loss(curvatures, lr=lr, noise=noise, batch_size=batch_size)
    assert found == pytest.approx(float((curvatures * variances).sum() / 2), rel=1e-9)


@pytest.mark.parametrize("beta", [0.5, 0.9])
def test_the_price_with_momentum_is_the_stationary_loss_of_the_heavy_ball(beta):
    lr, noise, batch_size = 0.1, 2.0, 8
    found = 0.0
    for h in (0.5, 3.0, 15.0):
        step = np.array([[1 - lr * h, -lr * beta], [h, beta]])  # of position and velocity
        shake = np.array([-lr, 1.0])
        moments = solve_discrete_lyapunov(step, noise / batch_size * np.outer(shake, shake))
        found += h * moments[0, 0] / 2
    price = excess_loss(torch.tensor([0.5, 3.0, 15.0]), lr=lr, noise=noise, batch_size=batch_size, momentum=beta)
    assert price == pytest.approx(found, rel=1e-9)


def test_the_mean_of_a_quantity_is_that_of_the_gaussian():
    options = {"edges": np.array([-9.0, 0.0, 9.0]), "temperature": 0.5}
    assert gibbs_mean(lambda x: 2 * x**2, lambda x: 2 * x**2, **options) == pytest.approx(0.25, rel=1e-9)  # T / 2
    assert gibbs_mean(lambda x: 2 * x**2, lambda x: (x - 1) ** 2, **options) == pytest.approx(1.125, rel=1e-9)


# -- walkers -------------------------------------------------------------------------------------------------


def test_walkers_are_those_of_their_seed_and_global_random_state_is_left():
    before = torch.get_rng_state()
    start = torch.zeros(50, 2, dtype=torch.float64)
    runs = [
        simulate(torch.zeros_like, start, lambda x: x[:, 0] > 1, lr=0.1, noise=4.0, batch_size=1, steps=60, seed=seed)
        for seed in (0, 0, 1)
    ]
    assert torch.equal(runs[0].steps, runs[1].steps)
    assert not torch.equal(runs[0].steps, runs[2].steps)
    assert torch.equal(torch.get_rng_state(), before)
    assert not start.any()


def test_walkers_with_momentum_step_as_torch_does():
    channel, start = Channel(WELL, walls=40.0), torch.tensor([[-1.2, 0.3], [0.4, -0.2]], dtype=torch.float64)
    param = torch.nn.Parameter(start.clone())
    optimizer = torch.optim.SGD([param], lr=0.01, momentum=0.9)
    for _ in range(30):
        optimizer.zero_grad()
        channel(param).sum().backward()
        optimizer.step()
    options = {"lr": 0.01, "noise": 0.0, "batch_size": 1, "momentum": 0.9, "steps": 30}
    never = simulate(channel.gradient, start, lambda x: torch.zeros(len(x), dtype=torch.bool), **options)
    torch.testing.assert_close(never.ends, param.detach())
    # One arrives on its way, and the other goes on with its own velocity.
    one = simulate(channel.gradient, start, lambda x: x[:, 0] < -0.9, **options)
    assert one.steps.tolist() == [1, -1]
    torch.testing.assert_close(one.ends[1], never.ends[1])


def test_the_mean_counts_those_that_have_not_arrived():
    found = Escapes(torch.tensor([10, -1, 30, -1]), taken=100, ends=torch.zeros(4, 1))
    assert found.reached == 0.5
    # One arrives at 10, a tenth of the steps; three go on for 20 + 90 + 90 more until one has arrived.
    assert found.mean == pytest.approx((10 + 3 * (10 + 200)) / 4)
    variance = np.var([10, 210, 210, 210]) / 4 + (3 / 4 * 200) ** 2 / 1
    assert found.standard_error == pytest.approx(math.sqrt(variance))
    assert Escapes(torch.tensor([-1, -1]), taken=100, ends=torch.zeros(2, 1)).mean == math.inf


def test_arrivals_that_begin_late_do_not_make_the_mean_of_censored_times_long():
    """Nobody arrives in the first 100 steps; steps over arrivals would be 165 too many, nine standard errors."""
    generator = torch.Generator().manual_seed(0)
    times = 100 + torch.empty(50_000).exponential_(1 / 2000, generator=generator).long() + 1
    steps = torch.where(times <= 1000, times, -1)
    found = Escapes(steps, taken=1000, ends=torch.zeros(len(steps), 1))
    assert 0.3 < found.reached < 0.4
    assert abs(found.mean - 2100) < 3 * found.standard_error
    assert found.standard_error < 20
    everyone = Escapes(times, taken=int(times.max()), ends=torch.zeros(len(steps), 1))
    assert everyone.mean == pytest.approx(float(times.double().mean()), rel=1e-12)
    assert everyone.standard_error == pytest.approx(2000 / math.sqrt(50_000), rel=0.06)


def test_walkers_end_where_they_arrived_or_after_the_last_step():
    start = torch.tensor([[1.0, 2.0], [8.0, -4.0]], dtype=torch.float64)
    options = {"lr": 0.5, "noise": 0.0, "batch_size": 1, "steps": 3}
    found = simulate(lambda x: x, start, lambda x: x[:, 0] <= 0.5, **options)  # halved in each step
    assert found.steps.tolist() == [1, -1]
    torch.testing.assert_close(found.ends, torch.tensor([[0.5, 1.0], [1.0, -0.5]], dtype=torch.float64))


def test_a_matrix_scales_the_step_and_its_noise_along_a_direction():
    """Along v the walker moves gamma times as fast and is shaken gamma times as much; across v as ever."""
    v, gamma = torch.tensor([0.6, 0.8], dtype=torch.float64), 0.25
    matrix = torch.eye(2, dtype=torch.float64) - (1 - gamma) * torch.outer(v, v)
    start = torch.tensor([[1.0, 2.0]], dtype=torch.float64).expand(3, -1)
    curvature = torch.tensor([[3.0, 1.0], [1.0, 2.0]], dtype=torch.float64)
    options = {"lr": 0.1, "noise": 2.0, "batch_size": 3, "steps": 1, "seed": 4}
    never = {"goal": lambda x: torch.zeros(len(x), dtype=torch.bool), **options}
    plain = simulate(lambda x: x @ curvature, start, **never).ends - start
    scaled = simulate(lambda x: x @ curvature, start, scale=matrix, **never).ends - start
    torch.testing.assert_close(scaled @ v, gamma * (plain @ v))
    across = torch.tensor([-0.8, 0.6], dtype=torch.float64)
    torch.testing.assert_close(scaled @ across, plain @ across)
    factors = torch.tensor([0.5, 2.0], dtype=torch.float64)
    one, two = (simulate(lambda x: x, start, scale=s, **never).ends for s in (factors, torch.diag(factors)))
    torch.testing.assert_close(one, two)


@pytest.mark.parametrize("gamma", [1.0, 0.3])
def test_simulated_sgd_leaves_the_channel_as_its_marginal_says(gamma):
    """Scaling the step across it leaves the way out as it is, but for what y does to x: 12 % here."""
    channel, lr, noise, batch_size = Channel(WELL, walls=40.0), 0.01, 1000.0, 10
    heat = temperature(lr=lr, noise=noise, batch_size=batch_size)
    found = simulate(
        channel.gradient,
        torch.tensor([[SHARP, 0.0]]).expand(4000, -1),
        lambda x: x[:, 0] >= FLAT,
        lr=lr,
        noise=noise,
        batch_size=batch_size,
        steps=20_000,
        scale=torch.tensor([1.0, gamma]),
    )
    potential = channel.marginal(temperature=gamma * heat, rate=gamma * lr)
    wanted = passage_time(potential, start=SHARP, end=FLAT, far=-3.0, temperature=heat) / lr
    assert found.reached == 1
    assert abs(found.mean - wanted) < 3 * found.standard_error + 0.02 * wanted  # y is not infinitely fast, nor lr 0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Channel(walls=0.0), "expected walls to be a finite number above 0, got 0"),
        (
            lambda: simulate(
                torch.zeros_like,
                torch.zeros(3, 2),
                lambda x: x[:, 0] > 1,
                lr=0.1,
                noise=1.0,
                batch_size=1,
                steps=1,
                scale=torch.ones(3),
            ),
            r"scale of shape \(2,\) or \(2, 2\), got \(3,\)",
        ),
        (
            lambda: temperature(lr=0.1, noise=1.0, batch_size=1, momentum=1.0),
            "momentum to be a number of at least 0 and below 1, got 1",
        ),
        (lambda: DoubleWell(skew=1.0), r"a skew in \[0, 1\), got 1"),
        (lambda: passage_time(WELL, start=0.0, end=1.0, far=2.0, temperature=0.1), "start between far and end"),
        (
            lambda: passage_time(WELL, start=SHARP, end=0.0, far=-1.0, temperature=0.1),
            "30 temperatures above its least",
        ),
        (
            lambda: escape_time(
                barrier=1.0, temperature=0.1, minimum=torch.tensor([-1.0]), saddle=torch.tensor([-1.0])
            ),
            "expected a minimum",
        ),
        (
            lambda: escape_time(barrier=1.0, temperature=0.1, minimum=torch.ones(2), saddle=-torch.ones(2)),
            "exactly one negative eigenvalue",
        ),
        (
            lambda: simulate(
                torch.zeros_like, torch.zeros(3), lambda x: x > 1, lr=0.1, noise=1.0, batch_size=1, steps=1
            ),
            r"shape \(walkers, dimensions\), real numbers, got a Tensor of shape \(3,\)",
        ),
    ],
)
def test_what_is_out_of_range_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
