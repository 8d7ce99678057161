"""The formulas of the papers once more, written independently of the package.

Plain Python floats, one number at a time.
"""
import math

PREDICTION_TYPES = ("epsilon", "sample", "v_prediction") # of the papers, and of diffusers


def betas(schedule, T):
    "Linear (2006.11239, 4; times 1000/T) or cosine (2102.09672, eq. 17) betas."
    if schedule == "linear": return [(1e-4 + (0.02 - 1e-4)*i/(T - 1)) * 1000/T for i in range(T)]
    def f(u): return math.cos((u + 0.008)/1.008 * math.pi/2)**2
    return [min(1 - f((i + 1)/T)/f(i/T), 0.999) for i in range(T)]


def alpha_bar(betas, t):
    "Share of the signal's variance that is left at t. At t = -1 all of it is left."
    return math.prod(1 - beta for beta in betas[:t + 1])


def flow(T, t):
    "Signal and sigma on the straight path at t; clean data at t = -1."
    return 1 - (t + 1)/T, (t + 1)/T


def product_of_gaussians(mean_1, variance_1, mean_2, variance_2):
    "Mean and variance of the normalised product of two normal densities."
    precision = 1/variance_1 + 1/variance_2
    return (mean_1/variance_1 + mean_2/variance_2)/precision, 1/precision


def posterior(betas, t, prev_t):
    """Weights of x0 and x_t in the posterior mean, and its two variances.

    They follow from Bayes' rule for two normal distributions: x_prev given x0 is N(sqrt(a) x0, 1 - a), and
    x_t given x_prev is N(sqrt(alpha) x_prev, 1 - alpha).
    """
    a, alpha = alpha_bar(betas, prev_t), math.prod(1 - beta for beta in betas[prev_t + 1:t + 1])
    if prev_t < 0: return 1., 0., 0., 1 - alpha   # the result is x0 itself, and that is known
    variance = 1/(1/(1 - a) + alpha/(1 - alpha))
    return variance*math.sqrt(a)/(1 - a), variance*math.sqrt(alpha)/(1 - alpha), variance, 1 - alpha


def best_guess(betas, t, mean, std):
    "The best guess of x0 from x_t for N(mean, std^2) pixels: offset and slope in `offset + slope x_t`."
    a = alpha_bar(betas, t)
    slope = math.sqrt(a)*std**2/(a*std**2 + 1 - a)
    return mean*(1 - slope*math.sqrt(a)), slope


def gaussian_denoiser(betas, prediction_type, mean, std):
    "A model that knows the answer for N(mean, std^2) pixels, for each of the three prediction types."
    def model(x, t):
        a = alpha_bar(betas, int(t[0]))
        offset, slope = best_guess(betas, int(t[0]), mean, std)
        x0 = offset + slope*x
        noise = (x - math.sqrt(a)*x0)/math.sqrt(1 - a)
        velocity = math.sqrt(a)*noise - math.sqrt(1 - a)*x0
        return {"sample": x0, "epsilon": noise, "v_prediction": velocity}[prediction_type]
    return model


def flow_denoiser(T, prediction_type, mean, std):
    "As `gaussian_denoiser`, on the straight path, in each of the four ways to say it."
    def model(x, t):
        signal, sigma = flow(T, int(t[0]))
        x0 = mean + signal*std**2/(signal**2*std**2 + sigma**2)*(x - signal*mean)
        noise = (x - signal*x0)/sigma
        velocity = signal*noise - sigma*x0
        return {"sample": x0, "epsilon": noise, "v_prediction": velocity, "flow": noise - x0}[prediction_type]
    return model


def ancestral_moments(betas, pairs, variance_type, mean, std):
    "Mean and variance of a pixel after each ancestral step with `gaussian_denoiser`, from N(0, 1)."
    m, v, found = 0., 1., []
    for t, prev_t in pairs:
        offset, slope = best_guess(betas, t, mean, std)
        of_x0, of_x_t, small, large = posterior(betas, t, prev_t)
        added = 0. if prev_t < 0 else {"fixed_small": small, "fixed_large": large}[variance_type]
        m, v = of_x0*(offset + slope*m) + of_x_t*m, (of_x0*slope + of_x_t)**2 * v + added
        found.append((m, v))
    return found
