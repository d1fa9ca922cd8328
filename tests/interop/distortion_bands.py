"""Signal-to-noise ratios of the formats on normal weights, by exhaustive nearest-value search in float64.

usage: distortion_bands.py        (NumPy only)

Independent of the C++ codecs: the values of each code are listed, scales follow the published formulas, and each element
takes the nearest value. Prints mean and extremes over seeds; the bands in src/quant/matrix_test.cc come from it.
"""

import numpy as np

ROWS, COLS, SEEDS = 64, 1024, 10
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])


def minifloat(exponent: int, mantissa: int, bias: int, top: float) -> np.ndarray:
    m = np.arange(2**mantissa) / 2**mantissa
    rows = [m * 2.0 ** (1 - bias)]
    rows += [(1 + m) * 2.0 ** (e - bias) for e in range(1, 2**exponent)]
    values = np.concatenate(rows)
    return values[values <= top]


E4M3 = minifloat(4, 3, 7, 448)
E5M2 = minifloat(5, 2, 15, 57344)


def nearest(x: np.ndarray, magnitudes: np.ndarray) -> np.ndarray:
    a = np.clip(np.abs(x), 0, magnitudes[-1])
    i = np.searchsorted(magnitudes, a).clip(1, len(magnitudes) - 1)
    low, high = magnitudes[i - 1], magnitudes[i]
    return np.sign(x) * np.where(a - low <= high - a, low, high)


def floats(w: np.ndarray, magnitudes: np.ndarray, group: int | None) -> np.ndarray:
    g = w.reshape(-1, group) if group else w.reshape(1, -1)
    scale = np.abs(g).max(1, keepdims=True) / magnitudes[-1]
    return (nearest(g / scale, magnitudes) * scale).reshape(w.shape)


def integers(w: np.ndarray, bits: int, group: int, asymmetric: bool) -> np.ndarray:
    g = w.reshape(-1, group)
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    if asymmetric:
        least, most = np.minimum(g.min(1, keepdims=True), 0), np.maximum(g.max(1, keepdims=True), 0)
        scale = (most - least) / (high - low)
        zero = np.round(low - least / scale).clip(low, high)
    else:
        scale, zero = np.abs(g).max(1, keepdims=True) / ((high - low) / 2), 0
    return ((np.round(g / scale + zero).clip(low, high) - zero) * scale).reshape(w.shape)


def nvfp4(w: np.ndarray) -> np.ndarray:
    g = w.reshape(-1, 16)
    scale_of_scales = np.abs(w).max() / 2688
    block = nearest(np.abs(g).max(1, keepdims=True) / 6 / scale_of_scales, E4M3)
    return (nearest(g / (block * scale_of_scales), E2M1) * block * scale_of_scales).reshape(w.shape)


def mx(w: np.ndarray, magnitudes: np.ndarray) -> np.ndarray:
    g = w.reshape(-1, 32)
    amax = np.abs(g).max(1, keepdims=True)
    e = np.floor(np.log2(amax))
    e += amax / 2**e >= 1.75
    scale = 2 ** (e - np.floor(np.log2(magnitudes[-1])))
    return (nearest(g / scale, magnitudes) * scale).reshape(w.shape)


def main() -> None:
    formats = {
        "int8-w8a16": lambda w: integers(w, 8, COLS, False),
        "int8-g128/none": lambda w: integers(w, 8, 128, False),
        "int4-g128-w4a16": lambda w: integers(w, 4, 128, True),
        "int4-g128-sym-w4a16": lambda w: integers(w, 4, 128, False),
        "nvfp4-w4a16": nvfp4,
        "mxfp4-w4a16": lambda w: mx(w, E2M1),
        "fp8-w8a16": lambda w: floats(w, E4M3, COLS),
        "fp8-w8a8-static": lambda w: floats(w, E4M3, None),
        "mxfp8-w8a8": lambda w: mx(w, E4M3),
        "fp8e5m2-channel/none": lambda w: floats(w, E5M2, COLS),
    }
    for name, codec in formats.items():
        snr = []
        for seed in range(SEEDS):
            w = np.random.default_rng(seed).normal(0, 0.02, (ROWS, COLS))
            snr.append(10 * np.log10((w**2).sum() / ((codec(w) - w) ** 2).sum()))
        print(f"{name:22} {np.mean(snr):.2f} dB, {min(snr):.2f} to {max(snr):.2f}")


if __name__ == "__main__":
    main()
