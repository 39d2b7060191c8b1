"""NumPyro's HMC and NUTS, vectorised over images, on a convolutional decoder in JAX.

This runs in a process of its own (:func:`serve`), so that JAX's threads can be bounded to the
number torch uses and nothing of it stays in the benchmark's process. It knows neither torch nor
Pyro: it gets weights as arrays.

One program per kernel and size: adaptation and sampling of one image in a ``lax.scan``, ``vmap``
over images, ``jit``. Every image thus has its own step size, as in this library. A transposed
convolution is a convolution of the input with holes (``lhs_dilation``) and the kernel turned
around.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np


class Layer(NamedTuple):
    """A transposed convolution; its weight ``(height, width, in, out)`` is turned around."""

    weight: np.ndarray
    bias: np.ndarray
    stride: int
    padding: int
    dilation: int


class Job(NamedTuple):
    """What is to be run: ``transitions`` of which the first ``warmup`` adapt the step size.

    ``algorithm`` is ``"HMC"`` (``steps`` leapfrog steps) or ``"NUTS"`` (trees of at most ``steps``
    doublings); ``precision`` is JAX's name of that of float32 products on a GPU, where its default
    is TF32 and ``"highest"`` float32.
    """

    algorithm: str
    warmup: int
    transitions: int
    steps: int
    step_size: float
    seed: int
    precision: str = "default"


class Place(NamedTuple):
    """Where to compute: ``"cpu"`` or ``"cuda"``, which card, and how many CPUs may be used."""

    device: str
    card: int
    threads: int


def serve(
    connection: Any,
    place: Place,
    layers: list[Layer],
    inverse_mass: np.ndarray,
    x: np.ndarray,
    start: np.ndarray,
) -> None:
    """Answer requests until one is ``None``.

    The first message sent is ``{"versions": ...}``. The request ``"energy"`` is answered by
    energies and gradients at ``start``, in full precision; a :class:`Job` by its wall time, what
    compiling it took the first time, and what was found. What fails is answered by
    ``{"error": ...}``.

    Args:
        connection: end of a pipe.
        place: device and CPUs that this process may use.
        layers: the decoder; a ReLU follows each layer but the last, which gives Bernoulli logits.
        inverse_mass: diagonal of the inverse mass matrix, ``(D,)``.
        x: images ``(N, H, W, C)`` in [0, 1].
        start: latents ``(N, D)``.
    """
    try:
        _serve(connection, place, layers, inverse_mass, x, start)
    except Exception as error:  # an answer rather than a trace in another process's output
        connection.send({"error": f"{type(error).__name__}: {error}"})


def _serve(
    connection: Any,
    place: Place,
    layers: list[Layer],
    inverse_mass: np.ndarray,
    x: np.ndarray,
    start: np.ndarray,
) -> None:
    # Before JAX starts its threads, of which it takes as many as there are CPUs to run on.
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-place.threads :])
    # Before it looks for devices: this one or none, and memory as it is needed.
    os.environ["JAX_PLATFORMS"] = place.device
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    import jax
    import numpyro

    device = jax.devices()[place.card]
    jax.config.update("jax_default_device", device)
    x, start = jax.device_put((x, start), device)
    programs: dict[Job, tuple[Callable[[], dict[str, Any]], float]] = {}
    energy_and_gradient = jax.jit(
        jax.vmap(jax.value_and_grad(lambda z, image: energy(layers, z, image)))
    )
    versions = {"jax": jax.__version__, "numpyro": numpyro.__version__}
    connection.send({"versions": versions})
    while (request := connection.recv()) is not None:
        if request == "energy":
            with jax.default_matmul_precision("highest"):
                found = energy_and_gradient(start, x)
            connection.send(tuple(np.asarray(part) for part in found))
            continue
        try:
            if request not in programs:
                with jax.default_matmul_precision(request.precision):
                    programs[request] = _compile(request, layers, inverse_mass, x, start)
            call, compile_seconds = programs[request]
            began = time.perf_counter()
            found = call()
            seconds = {"seconds": time.perf_counter() - began, "compile_seconds": compile_seconds}
            connection.send({**seconds, **found})
        except Exception as error:  # other jobs may do
            connection.send({"error": f"{type(error).__name__}: {error}"})


def energy(layers: list[Layer], z: Any, image: Any) -> Any:
    """-log p(x, z) of one image ``(H, W, C)`` in nats, ``z`` of shape ``(D,)``."""
    import jax
    import jax.numpy as jnp

    hidden = z[None, None, None, :]
    for number, layer in enumerate(layers):
        if number > 0:
            hidden = jax.nn.relu(hidden)
        # The kernel's extent less the padding of the transposed convolution.
        margins = [layer.dilation * (n - 1) - layer.padding for n in layer.weight.shape[:2]]
        hidden = jax.lax.conv_general_dilated(
            hidden,
            layer.weight,
            window_strides=(1, 1),
            padding=[(margin, margin) for margin in margins],
            lhs_dilation=(layer.stride, layer.stride),
            rhs_dilation=(layer.dilation, layer.dilation),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        hidden = hidden + layer.bias
    logits = hidden[0]
    likelihood = jnp.sum(image * logits - jax.nn.softplus(logits))
    prior = -0.5 * jnp.sum(z**2) - 0.5 * z.size * np.log(2 * np.pi)
    return -(likelihood + prior)


def _compile(
    job: Job, layers: list[Layer], inverse_mass: np.ndarray, x: np.ndarray, start: np.ndarray
) -> tuple[Callable[[], dict[str, Any]], float]:
    import jax
    from numpyro.infer.hmc import hmc

    if job.algorithm == "HMC":
        # NumPyro's default trajectory_length would replace the step size by its own quotient.
        length = {"num_steps": job.steps, "trajectory_length": None}
    else:
        length = {"max_tree_depth": job.steps}

    def one_image(key: Any, image: Any, z: Any) -> Any:
        init, sample = hmc(lambda z: energy(layers, z, image), algo=job.algorithm)
        state = init(
            z,
            job.warmup,
            step_size=job.step_size,
            inverse_mass_matrix=inverse_mass,
            adapt_mass_matrix=False,
            rng_key=key,
            **length,
        )

        def transition(state: Any, _: None) -> Any:
            state = sample(state)
            return state, (state.z, state.num_steps, state.accept_prob)

        return jax.lax.scan(transition, state, None, length=job.transitions)[1]

    keys = jax.random.split(jax.random.PRNGKey(job.seed), len(x))
    began = time.perf_counter()
    compiled = jax.jit(jax.vmap(one_image)).lower(keys, x, start).compile()
    compile_seconds = time.perf_counter() - began

    def call() -> dict[str, Any]:
        draws, num_steps, acceptance = jax.block_until_ready(compiled(keys, x, start))
        steps = np.asarray(num_steps)  # (N, transitions)
        return {
            "gradients": 1 + float(steps.sum(1).mean()),
            # Under vmap images move in step: a transition lasts as long as its largest tree.
            "batch_gradients": 1 + float(steps.max(0).sum()),
            "acceptance_rate": float(np.asarray(acceptance)[:, job.warmup :].mean()),
            "finite": bool(np.isfinite(np.asarray(draws)).all()),
        }

    return call, compile_seconds
