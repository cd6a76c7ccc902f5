"""Training mask routers: linear functions of a token that tell how many of its experts it needs.

There are two kinds, of equal shape, both trained on losses from calibration text. `loss` predicts the logarithm of the
loss of keeping each number of experts: a gamma regression with a log link, fitted by Fisher scoring, since losses from
a few labels are unbiased and distributed like chi squares. `otp` scores the numbers as OTP does: it is trained to
choose, with straight-through samples of a Gumbel softmax at falling temperature. Instead of OTP's fixed penalty on
experts, a price is sampled for each token in training, so that one router serves every cut.
"""

import numpy as np

ROUNDS = 12  # of the regression
RIDGE = 1000.0  # on the regression's coefficients of inputs with unit variance; 30 is as good from 20,000 tokens on
MOST_RESIDUAL = 8.0  # maximum residual of a token in a round of the regression, relative to its expected loss

STEPS, BATCH = 4000, 512  # of OTP's training
TEMPERATURES = (4.0, 0.1)  # first and last, with geometric decay in between
RATE = 0.01  # learning rate of Adam, decaying to 0
MOMENTS = (0.9, 0.999)
MOST_LOSS = 50.0  # losses are clipped to this in training, in units of the middle price


def fit_losses(inputs: np.ndarray, losses: np.ndarray) -> np.ndarray:
    """Fit a mask router of `loss`, (top_k, columns): the logarithm of the mean loss of keeping 1, 2, ... experts.

    inputs: (rows, columns), the last column 1. losses: (rows, top_k), the last column is not fitted.
    """
    x, mean, deviation = standardised(inputs)
    pull = np.full(x.shape[1], RIDGE)
    pull[-1] = 0
    inverse = np.linalg.inv(x.T @ x + np.diag(pull + 1e-9))
    router = np.zeros((losses.shape[1], x.shape[1]))
    for row, its in zip(router[:-1], losses.T, strict=False):
        row[-1] = np.log(its.mean() + 1e-12)
        for _ in range(ROUNDS):
            residual = its / np.exp(np.clip(x @ row, -30, 10)) - 1
            row += 0.7 * (inverse @ (x.T @ np.clip(residual, -1, MOST_RESIDUAL) - pull * row))
    return of_inputs(router, mean, deviation)


def train_otp(inputs: np.ndarray, losses: np.ndarray, prices: tuple[float, float], seed: int) -> np.ndarray:
    """Train a mask router of `otp`, (top_k, columns): scores, from which prices relative to their geometric mean are
    subtracted.

    inputs: (rows, columns), the last column 1. losses: (rows, top_k) nats. prices: minimum and maximum nats an expert.
    """
    random, (x, mean, deviation) = np.random.default_rng(seed), standardised(inputs)
    unit, top_k = np.sqrt(prices[0] * prices[1]), losses.shape[1]
    losses = np.minimum(losses / unit, MOST_LOSS).astype(np.float32)
    low, high = np.log(np.array(prices) / unit)
    router = np.zeros((top_k, x.shape[1]), np.float32)
    router[:, -1] = np.arange(top_k) * np.exp(high)  # initially keeps all experts
    first, second = np.zeros_like(router), np.zeros_like(router)
    for step in range(STEPS):
        rows = random.integers(len(x), size=BATCH)
        done = step / STEPS
        temperature = TEMPERATURES[0] * (TEMPERATURES[1] / TEMPERATURES[0]) ** done
        price = np.exp(random.uniform(low, high, (BATCH, 1)))
        paid = (price * np.arange(1, top_k + 1)).astype(np.float32)
        noise = random.gumbel(size=(BATCH, top_k)).astype(np.float32)
        soft = (x[rows] @ router.T - paid + noise) / temperature
        soft = np.exp(soft - soft.max(axis=1, keepdims=True))
        soft /= soft.sum(axis=1, keepdims=True)
        cost = losses[rows] + paid
        slope = soft * (cost - (soft * cost).sum(axis=1, keepdims=True)) / temperature
        gradient = slope.T @ x[rows] / BATCH
        first = MOMENTS[0] * first + (1 - MOMENTS[0]) * gradient
        second = MOMENTS[1] * second + (1 - MOMENTS[1]) * np.square(gradient)
        update = first / (1 - MOMENTS[0] ** (step + 1))
        update /= np.sqrt(second / (1 - MOMENTS[1] ** (step + 1))) + 1e-8
        router -= RATE * (1 - done) * update
    return of_inputs(router, mean, deviation)


def standardised(inputs: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The inputs with mean 0 and variance 1, except the last column, and their former means and deviations."""
    mean, deviation = inputs.mean(0, dtype=np.float64), inputs.std(0, dtype=np.float64) + 1e-6
    mean[-1], deviation[-1] = 0, 1
    return ((inputs - mean) / deviation).astype(np.float32), mean, deviation


def of_inputs(router: np.ndarray, mean: np.ndarray, deviation: np.ndarray) -> np.ndarray:
    """Convert a router of standardised inputs to one of the original inputs."""
    router = router / deviation
    router[:, -1] -= router @ mean
    return router.astype(np.float32)
