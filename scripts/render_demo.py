"""Render the demo picture: mountains at a lake in the evening, from seeded noise.

python scripts/render_demo.py tests/data/demo.png
"""

from __future__ import annotations

import sys

import numpy as np
from PIL import Image

WIDTH, HEIGHT = 768, 512
HORIZON, SHORE = 318, 420  # rows where the water begins and, about, where it ends
SUN = (0.30, 0.34)  # fractions of width and height

Array = np.ndarray


def noise(rng: np.random.Generator, shape: tuple[int, int], slope: float, stretch: float = 1.0) -> Array:
    """Noise (H, W) with a power spectrum of 1/f^(2·slope), mean 0, deviation 1, stretched along x."""
    fy = np.fft.fftfreq(shape[0])[:, None]
    fx = np.fft.rfftfreq(shape[1])[None, :] * stretch
    frequency = np.hypot(fx, fy)
    frequency[0, 0] = 1
    field = np.fft.irfft2(np.fft.rfft2(rng.standard_normal(shape)) / frequency**slope, shape)
    return (field - field.mean()) / field.std()


def profile(rng: np.random.Generator, slope: float) -> Array:
    """A skyline (W,): one-dimensional noise, deviation 1."""
    return noise(rng, (4, 2 * WIDTH), slope)[0, :WIDTH]


def smooth(low: float, high: float, x: Array) -> Array:
    t = np.clip((x - low) / (high - low), 0, 1)
    return t * t * (3 - 2 * t)


def mix(a: Array, b: Array, t: Array) -> Array:
    return a + (b - a) * t[..., None]


def colour(*rgb: float) -> Array:
    return np.array(rgb)


def sky(rng: np.random.Generator, x: Array, y: Array) -> Array:
    up = np.clip(1 - y / 0.62, 0, 1)
    picture = mix(colour(0.98, 0.66, 0.40), colour(0.62, 0.62, 0.72), smooth(0.0, 0.45, up))
    picture = mix(picture, colour(0.20, 0.33, 0.56), smooth(0.3, 1.0, up))
    distance = np.hypot((x - SUN[0]) * 1.5, y - SUN[1])
    picture = picture + np.exp(-distance / 0.16)[..., None] * colour(0.50, 0.30, 0.12)
    density = noise(rng, y.shape, 1.75, stretch=2.2) + 0.2 * noise(rng, y.shape, 1.2, stretch=2.0)
    cover = smooth(-0.1, 1.9, density + 0.5 * up - 0.1)
    # Clouds are lit from where the sun is: brighter where the density falls towards it.
    light = np.clip(0.5 + 1.6 * (density - np.roll(density, (-3, -5), (0, 1))), 0, 1)
    shaded = mix(colour(0.42, 0.38, 0.46), colour(1.0, 0.80, 0.62), 0.25 + 0.6 * light * np.exp(-distance / 0.6))
    picture = mix(picture, shaded, 0.85 * cover)
    return mix(picture, colour(1.25, 1.12, 0.85), 1 - smooth(0.021, 0.025, np.hypot((x - SUN[0]) * 1.5, y - SUN[1])))


def ridge(rng: np.random.Generator, height: Array, base: float, amount: float, tint: Array, haze: float) -> Array:
    """A mountain range, (H, W, 4): colours and coverage. Its skyline is around the row ``base``."""
    line = base - amount * (0.55 * profile(rng, 1.6) + 0.45 * np.abs(profile(rng, 1.2)))
    alpha = smooth(-0.7, 0.7, height - line)
    relief = noise(rng, height.shape, 1.8) + 0.06 * noise(rng, height.shape, 1.2)
    slope = relief - np.roll(relief, (1, 2), (0, 1))
    lit = np.clip(0.45 + 0.27 * slope / slope.std(), 0, 1.2)
    depth = height - line
    rock = tint * (0.35 + 0.9 * lit)[..., None]
    snow = smooth(0.1, 0.9, relief * 0.5 + 0.9 - depth / (0.9 * amount + 1)) * (haze > 0.25) * (haze < 0.6)
    rock = mix(rock, colour(0.90, 0.82, 0.80) * (0.45 + 0.65 * lit)[..., None], 0.75 * snow)
    fog = np.clip(haze + 0.35 * smooth(0, 90, depth), 0, 0.92)
    return np.dstack([mix(rock, colour(0.80, 0.62, 0.52), fog), alpha])


def forest(rng: np.random.Generator, height: Array) -> Array:
    """A dark belt of conifers above the water, with alpha."""
    line = HORIZON - 16 - 9 * profile(rng, 1.3)
    columns = np.arange(WIDTH)
    for _ in range(420):
        centre, tall, wide = rng.uniform(0, WIDTH), rng.uniform(5, 24), rng.uniform(2.0, 4.5)
        line = np.minimum(line, HORIZON - 12 - tall + np.abs(columns - centre) * tall / wide)
    line = line + rng.standard_normal(WIDTH) * 0.8
    texture = np.clip(0.5 + 0.3 * noise(rng, height.shape, 0.7), 0, 1)
    tone = mix(colour(0.045, 0.06, 0.055), colour(0.17, 0.15, 0.09), texture)
    return np.dstack([tone, smooth(-0.7, 0.7, height - line)])


def water(rng: np.random.Generator, above: Array, height: Array) -> Array:
    """The mirrored scene, rippled, darker towards the viewer."""
    depth = np.clip(height - HORIZON, 0, None)
    near = depth / (HEIGHT - HORIZON)
    ripple = noise(rng, height.shape, 1.0, stretch=5.0) + 0.6 * noise(rng, height.shape, 0.6, stretch=7.0)
    rows = HORIZON - 1.45 * depth + ripple * (0.6 + 13 * near)
    columns = np.arange(WIDTH)[None, :] + ripple * (0.4 + 4 * near)
    rows = np.clip(rows, 0, HORIZON - 1).astype(int)
    columns = np.clip(columns, 0, WIDTH - 1).astype(int)
    mirrored = above[rows, columns] * colour(0.74, 0.78, 0.84)
    deep = colour(0.07, 0.11, 0.15)
    return mix(mirrored, deep, np.clip(0.10 + 0.5 * near + 0.06 * ripple, 0, 0.8))


def foreground(rng: np.random.Generator, height: Array) -> Array:
    """A stony shore with dry grass, with alpha."""
    line = SHORE + 34 - 30 * np.linspace(1.6, -0.9, WIDTH) + 10 * profile(rng, 1.2)
    depth = height - line
    stones = noise(rng, height.shape, 1.15, stretch=1.3)
    fine = noise(rng, height.shape, 0.55)
    slope = stones - np.roll(stones, (2, -2), (0, 1))
    lit = np.clip(0.42 + 0.20 * slope / slope.std() + 0.10 * fine, 0.03, 1.2)
    ground = mix(colour(0.16, 0.14, 0.13), colour(0.62, 0.48, 0.36), lit)
    moss = smooth(0.2, 1.2, noise(rng, height.shape, 1.3)) * smooth(5, 30, depth)
    ground = mix(ground, colour(0.23, 0.25, 0.10) * (0.5 + lit)[..., None], 0.7 * moss)
    ground *= (0.45 + 0.55 * smooth(0, 12, depth))[..., None]  # wet at the edge
    return np.dstack([ground, smooth(-0.8, 0.8, depth)])


def grass(rng: np.random.Generator, picture: Array) -> None:
    """Blades in front of everything, drawn into ``picture``."""
    for _ in range(2600):
        x, root = rng.uniform(-20, WIDTH + 20), HEIGHT + rng.uniform(-6, 46) - 26 * rng.random() ** 2
        length, lean = rng.gamma(4, 9), rng.normal(0.25, 0.35)
        if rng.random() > smooth(0.1, 0.9, np.array(abs(x / WIDTH - 0.45) * 1.7)) + 0.12:
            continue
        tone = colour(0.50, 0.40, 0.19) * rng.uniform(0.25, 1.35) + colour(0.0, 0.03, 0.0) * rng.random()
        t = np.linspace(0, 1, int(3 * length) + 2)
        columns = (x + lean * length * t**1.8).astype(int)
        rows = (root - length * t).astype(int)
        inside = (columns >= 0) & (columns < WIDTH) & (rows >= 0) & (rows < HEIGHT)
        picture[rows[inside], columns[inside]] = tone * (0.5 + 0.6 * t[inside, None])


def over(back: Array, layer: Array) -> Array:
    return mix(back, layer[..., :3], layer[..., 3])


def render(seed: int = 20) -> Array:
    """The picture, uint8 (H, W, 3)."""
    rng = np.random.default_rng(seed)
    height, _ = np.mgrid[0:HEIGHT, 0:WIDTH].astype(float)
    y, x = np.mgrid[0:HEIGHT, 0:WIDTH] / np.array([HEIGHT, WIDTH]).reshape(2, 1, 1)
    scene = sky(rng, x, y)
    scene = over(scene, ridge(rng, height, 232, 30, colour(0.42, 0.40, 0.50), 0.62))
    scene = over(scene, ridge(rng, height, 246, 46, colour(0.36, 0.31, 0.34), 0.32))
    scene = over(scene, ridge(rng, height, 284, 22, colour(0.22, 0.20, 0.17), 0.16))
    scene = over(scene, forest(rng, height))
    scene = np.where((height >= HORIZON)[..., None], water(rng, scene, height), scene)
    scene = over(scene, foreground(rng, height))
    grass(rng, scene)
    # A lens: slightly soft, darker corners; a sensor: noise that grows with the signal.
    scene = 0.6 * scene + 0.1 * sum(np.roll(scene, shift, axis) for shift in (1, -1) for axis in (0, 1))
    scene *= (1 - 0.28 * ((x - 0.5) ** 2 + (y - 0.5) ** 2) / 0.5)[..., None]
    scene = np.clip(scene, 0, None)
    scene = scene / (1 + 0.18 * scene**2) * 1.08  # a soft shoulder instead of clipped highlights
    scene += rng.standard_normal(scene.shape) * (0.004 + 0.006 * np.sqrt(scene))
    return np.rint(255 * np.clip(scene, 0, 1)).astype(np.uint8)


if __name__ == "__main__":
    Image.fromarray(render()).save(sys.argv[1], optimize=True)
