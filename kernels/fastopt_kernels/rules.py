"""The update math of every optimizer, once, for both compilers.

A rule takes one element of the parameter, its gradient, its states and the scalars of the step,
all floats, and returns the new parameter and states as a tuple. It holds no number literals: a
literal is a double, and doubles halve the vector width. Beside each rule stands its host half,
which computes the scalars of a step in double. A scalars function takes `step` (counted from 1),
the carried scalars if there are any, and hyper-parameters by the names they have in a parameter
group (`beta1` is `betas[0]`); it returns the rule's scalars in order, then the carried ones.

The arithmetic is ordered so that huge, tiny and non-finite gradients give what torch gives.
"""

from __future__ import annotations

from fastopt_kernels import xp


def sgd(p: float, g: float, weight_decay: float, lr: float) -> tuple[float, ...]:
    """p' = p - lr (g + weight_decay p)."""
    g = xp.add_scaled(g, weight_decay, p)
    return (p - lr * g,)


def sgd_scalars(step: float, lr: float, weight_decay: float) -> tuple[float, ...]:
    return weight_decay, lr


def sgd_momentum(
    p: float, g: float, buf: float, weight_decay: float, lr: float, keep: float, damp: float
) -> tuple[float, ...]:
    """buf' = keep buf + damp g;  p' = p - lr buf'.  Polyak 1964; torch's first buf is g."""
    g = xp.add_scaled(g, weight_decay, p)
    buf = keep * buf + damp * g
    return p - lr * buf, buf


def sgd_momentum_scalars(
    step: float, lr: float, momentum: float, dampening: float, weight_decay: float
) -> tuple[float, ...]:
    keep = xp.where(step > 1.0, momentum, 0.0)
    damp = xp.where(step > 1.0, 1.0 - dampening, 1.0)
    return weight_decay, lr, keep, damp


def sgd_nesterov(
    p: float,
    g: float,
    buf: float,
    weight_decay: float,
    lr: float,
    keep: float,
    damp: float,
    momentum: float,
) -> tuple[float, ...]:
    """buf' = keep buf + damp g;  p' = p - lr (g + momentum buf').  Sutskever et al. 2013."""
    g = xp.add_scaled(g, weight_decay, p)
    buf = keep * buf + damp * g
    return p - lr * (g + momentum * buf), buf


def sgd_nesterov_scalars(
    step: float, lr: float, momentum: float, dampening: float, weight_decay: float
) -> tuple[float, ...]:
    keep = xp.where(step > 1.0, momentum, 0.0)
    damp = xp.where(step > 1.0, 1.0 - dampening, 1.0)
    return weight_decay, lr, keep, damp, momentum


def adam(
    p: float,
    g: float,
    m: float,
    v: float,
    weight_decay: float,
    decay: float,
    step_size: float,
    mu: float,
    beta2: float,
    nu: float,
    eps: float,
    v_scale: float,
) -> tuple[float, ...]:
    """p' = decay p - step_size m' / (v_scale sqrt(v') + eps).  Kingma & Ba 2015, algorithm 1;
    with `decay` below 1 it is AdamW: Loshchilov & Hutter 2019, algorithm 2."""
    g = xp.add_scaled(g, weight_decay, p)
    m = xp.lerp(m, g, mu)
    v = beta2 * v + (nu * g) * g
    p = decay * p - step_size * m / (v_scale * xp.sqrt(v) + eps)
    return p, m, v


def adam_amsgrad(
    p: float,
    g: float,
    m: float,
    v: float,
    v_max: float,
    weight_decay: float,
    decay: float,
    step_size: float,
    mu: float,
    beta2: float,
    nu: float,
    eps: float,
    v_scale: float,
) -> tuple[float, ...]:
    """Adam whose denominator never falls: v_max' = max(v_max, v').  Reddi et al. 2018."""
    g = xp.add_scaled(g, weight_decay, p)
    m = xp.lerp(m, g, mu)
    v = beta2 * v + (nu * g) * g
    v_max = xp.maximum(v_max, v)
    p = decay * p - step_size * m / (v_scale * xp.sqrt(v_max) + eps)
    return p, m, v, v_max


def adam_scalars(
    step: float,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    decoupled_weight_decay: float,
) -> tuple[float, ...]:
    coupled = xp.where(decoupled_weight_decay, 0.0, weight_decay)
    decay = xp.where(decoupled_weight_decay, 1.0 - lr * weight_decay, 1.0)
    step_size = lr / (1.0 - xp.power(beta1, step))
    v_scale = 1.0 / xp.sqrt(1.0 - xp.power(beta2, step))
    return coupled, decay, step_size, 1.0 - beta1, beta2, 1.0 - beta2, eps, v_scale


def adagrad(
    p: float, g: float, s: float, weight_decay: float, clr: float, eps: float
) -> tuple[float, ...]:
    """s' = s + g^2;  p' = p - clr g / (sqrt(s') + eps).  Duchi et al. 2011."""
    g = xp.add_scaled(g, weight_decay, p)
    s = s + g * g
    return p - clr * g / (xp.sqrt(s) + eps), s


def adagrad_scalars(
    step: float, lr: float, lr_decay: float, weight_decay: float, eps: float
) -> tuple[float, ...]:
    return weight_decay, lr / (1.0 + (step - 1.0) * lr_decay), eps


def rmsprop(
    p: float,
    g: float,
    s: float,
    weight_decay: float,
    lr: float,
    alpha: float,
    nu: float,
    eps: float,
) -> tuple[float, ...]:
    """s' = alpha s + (1 - alpha) g^2;  p' = p - lr g / (sqrt(s') + eps).  Hinton 2012."""
    g = xp.add_scaled(g, weight_decay, p)
    s = alpha * s + (nu * g) * g
    return p - lr * g / (xp.sqrt(s) + eps), s


def rmsprop_scalars(
    step: float, lr: float, alpha: float, eps: float, weight_decay: float
) -> tuple[float, ...]:
    return weight_decay, lr, alpha, 1.0 - alpha, eps


def rmsprop_centered(
    p: float,
    g: float,
    s: float,
    a: float,
    weight_decay: float,
    lr: float,
    alpha: float,
    nu: float,
    eps: float,
) -> tuple[float, ...]:
    """RMSprop by the variance: a' = alpha a + (1 - alpha) g, sqrt(s' - a'^2).  Graves 2013."""
    g = xp.add_scaled(g, weight_decay, p)
    s = alpha * s + (nu * g) * g
    a = xp.lerp(a, g, nu)
    return p - lr * g / (xp.sqrt(s - a * a) + eps), s, a


def rmsprop_momentum(
    p: float,
    g: float,
    s: float,
    buf: float,
    weight_decay: float,
    lr: float,
    alpha: float,
    nu: float,
    eps: float,
    momentum: float,
) -> tuple[float, ...]:
    """RMSprop through a momentum buffer: buf' = momentum buf + g / (sqrt(s') + eps)."""
    g = xp.add_scaled(g, weight_decay, p)
    s = alpha * s + (nu * g) * g
    buf = momentum * buf + g / (xp.sqrt(s) + eps)
    return p - lr * buf, s, buf


def rmsprop_centered_momentum(
    p: float,
    g: float,
    s: float,
    buf: float,
    a: float,
    weight_decay: float,
    lr: float,
    alpha: float,
    nu: float,
    eps: float,
    momentum: float,
) -> tuple[float, ...]:
    """Centered RMSprop through a momentum buffer.  Graves 2013, eqs. 38 to 41."""
    g = xp.add_scaled(g, weight_decay, p)
    s = alpha * s + (nu * g) * g
    a = xp.lerp(a, g, nu)
    buf = momentum * buf + g / (xp.sqrt(s - a * a) + eps)
    return p - lr * buf, s, buf, a


def rmsprop_momentum_scalars(
    step: float, lr: float, alpha: float, eps: float, weight_decay: float, momentum: float
) -> tuple[float, ...]:
    return weight_decay, lr, alpha, 1.0 - alpha, eps, momentum


def adadelta(
    p: float,
    g: float,
    s: float,
    d: float,
    weight_decay: float,
    lr: float,
    rho: float,
    nu: float,
    eps: float,
) -> tuple[float, ...]:
    """delta = sqrt(d + eps) / sqrt(s' + eps) g;  p' = p - lr delta.  Zeiler 2012, algorithm 1."""
    g = xp.add_scaled(g, weight_decay, p)
    s = rho * s + (nu * g) * g
    delta = xp.sqrt(d + eps) / xp.sqrt(s + eps) * g
    d = rho * d + (nu * delta) * delta
    return p - lr * delta, s, d


def adadelta_scalars(
    step: float, lr: float, rho: float, eps: float, weight_decay: float
) -> tuple[float, ...]:
    return weight_decay, lr, rho, 1.0 - rho, eps


def adamax(
    p: float,
    g: float,
    m: float,
    u: float,
    weight_decay: float,
    step_size: float,
    mu: float,
    beta2: float,
    eps: float,
) -> tuple[float, ...]:
    """u' = max(beta2 u, |g| + eps);  p' = p - step_size m' / u'.  Kingma & Ba 2015, algorithm 2."""
    g = xp.add_scaled(g, weight_decay, p)
    m = xp.lerp(m, g, mu)
    u = xp.maximum(beta2 * u, xp.absolute(g) + eps)
    return p - step_size * m / u, m, u


def adamax_scalars(
    step: float, lr: float, beta1: float, beta2: float, eps: float, weight_decay: float
) -> tuple[float, ...]:
    step_size = lr / (1.0 - xp.power(beta1, step))
    return weight_decay, step_size, 1.0 - beta1, beta2, eps


def nadam(
    p: float,
    g: float,
    m: float,
    v: float,
    weight_decay: float,
    decay: float,
    g_size: float,
    m_size: float,
    mu: float,
    beta2: float,
    nu: float,
    eps: float,
    v_scale: float,
) -> tuple[float, ...]:
    """p' = decay p - (g_size g + m_size m') / (v_scale sqrt(v') + eps).  Dozat 2016."""
    g = xp.add_scaled(g, weight_decay, p)
    m = xp.lerp(m, g, mu)
    v = beta2 * v + (nu * g) * g
    denom = v_scale * xp.sqrt(v) + eps
    p = decay * p - g_size * g / denom - m_size * m / denom
    return p, m, v


def nadam_scalars(
    step: float,
    mu_product: float,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    momentum_decay: float,
    decoupled_weight_decay: float,
) -> tuple[float, ...]:
    coupled = xp.where(decoupled_weight_decay, 0.0, weight_decay)
    decay = xp.where(decoupled_weight_decay, 1.0 - lr * weight_decay, 1.0)
    mu = beta1 * (1.0 - 0.5 * xp.power(0.96, step * momentum_decay))
    mu_next = beta1 * (1.0 - 0.5 * xp.power(0.96, (step + 1.0) * momentum_decay))
    mu_product = mu_product * mu
    g_size = lr * (1.0 - mu) / (1.0 - mu_product)
    m_size = lr * mu_next / (1.0 - mu_product * mu_next)
    v_scale = 1.0 / xp.sqrt(1.0 - xp.power(beta2, step))
    return (
        coupled,
        decay,
        g_size,
        m_size,
        1.0 - beta1,
        beta2,
        1.0 - beta2,
        eps,
        v_scale,
        mu_product,
    )


def radam(
    p: float,
    g: float,
    m: float,
    v: float,
    weight_decay: float,
    decay: float,
    step_size: float,
    tractable: float,
    rectification: float,
    mu: float,
    beta2: float,
    nu: float,
    eps: float,
) -> tuple[float, ...]:
    """p' = decay p - step_size m' (rectification / (sqrt(v') + eps) where the variance is
    tractable, else 1).  Liu et al. 2020, algorithm 2."""
    g = xp.add_scaled(g, weight_decay, p)
    m = xp.lerp(m, g, mu)
    v = beta2 * v + (nu * g) * g
    momentum = step_size * m
    adaptive = momentum * (rectification / (xp.sqrt(v) + eps))
    return decay * p - xp.where(tractable, adaptive, momentum), m, v


def radam_scalars(
    step: float,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    decoupled_weight_decay: float,
) -> tuple[float, ...]:
    step_size = lr / (1.0 - xp.power(beta1, step))
    coupled = xp.where(decoupled_weight_decay, 0.0, weight_decay)
    decay = xp.where(decoupled_weight_decay, 1.0 - lr * weight_decay, 1.0)
    beta2_power = xp.power(beta2, step)
    bias_correction2 = 1.0 - beta2_power
    rho_inf = 2.0 / (1.0 - beta2) - 1.0
    rho = rho_inf - 2.0 * step * beta2_power / bias_correction2
    tractable = rho > 5.0
    rho = xp.where(tractable, rho, 6.0)
    rho_inf = xp.where(tractable, rho_inf, 6.0)
    rectification = xp.sqrt(
        bias_correction2
        * ((rho - 4.0) * (rho - 2.0) * rho_inf / ((rho_inf - 4.0) * (rho_inf - 2.0) * rho))
    )
    return (
        coupled,
        decay,
        step_size,
        xp.where(tractable, 1.0, 0.0),
        rectification,
        1.0 - beta1,
        beta2,
        1.0 - beta2,
        eps,
    )
