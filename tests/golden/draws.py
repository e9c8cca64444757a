"""Redraws the weights and inputs of the golden files and checks their fingerprints."""

from pathlib import Path

import numpy as np
import torch

D = 768
FOLDER = Path(__file__).parent


class Draws:
    """Tensors of one golden file by name, drawn in the file's order from its seed."""

    def __init__(self, file: str) -> None:
        self.stored = dict(np.load(FOLDER / f"{file}.npz"))
        self.rs = np.random.RandomState(int(self.stored["seed"]))
        self.drawn: dict[str, torch.Tensor] = {}

    def draw(self, name: str, shape: tuple[int, ...], scale: float, offset: float = 0.0) -> None:
        value = np.float32(offset + scale * self.rs.standard_normal(shape))
        flat = value.astype(np.float64).ravel()
        found = [flat[0], flat[1], flat[-1], flat.sum(), np.abs(flat).sum()]
        want = self.stored[f"fp/{name}"]
        np.testing.assert_allclose(found[:3], want[:3], rtol=1e-6)
        assert abs(found[3] - want[3]) <= 1e-6 * want[4]
        assert abs(found[4] - want[4]) <= 1e-6 * want[4]
        self.drawn[name] = torch.from_numpy(value)

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.drawn[name]

    def number(self, name: str) -> int:
        return int(self.stored[name])

    def want(self, name: str) -> torch.Tensor:
        return torch.from_numpy(np.asarray(self.stored[name], dtype=np.float64))

    def factors(self, r: int, diagonal: bool) -> None:
        self.draw("U", (r, D), 0.05)
        self.draw("V", (D, r), 0.1)
        if diagonal:
            self.draw("lam", (r,), 1)
        else:
            self.draw("core", (r, r, r), 0.2)

    def attention(self, prefix: str, r: int, gain: float) -> None:
        for letter in "qkv":
            self.draw(f"{prefix}p_{letter}", (r,), 0.5)
        for letter in "qkvo":
            self.draw(f"{prefix}{letter}_w", (D, D), 0.02)
            self.draw(f"{prefix}{letter}_b", (D,), 0.05)
        self.draw(f"{prefix}ln_g", (D,), 0.1 * gain, gain)
        self.draw(f"{prefix}ln_b", (D,), 0.1 * gain)

    def layer(self, prefix: str, r: int, ffn: int, gain: float, cross: bool) -> None:
        self.attention(f"{prefix}self.", r, gain)
        if cross:
            self.attention(f"{prefix}cross.", r, 1)
        self.draw(f"{prefix}ffn1_w", (ffn, D), 0.02)
        self.draw(f"{prefix}ffn1_b", (ffn,), 0.05)
        self.draw(f"{prefix}ffn2_w", (D, ffn), 0.05)
        self.draw(f"{prefix}ffn2_b", (D,), 0.05)
        self.draw(f"{prefix}ffn_ln_g", (D,), 0.1, 1)
        self.draw(f"{prefix}ffn_ln_b", (D,), 0.1)
        for name in ("scale_self", "shift_self", "scale_cross", "shift_cross"):
            self.draw(f"{prefix}{name}", (D,), 1)

    def vit_block_attention(self, prefix: str, r: int, modes: str) -> None:
        self.draw(f"{prefix}{modes}", (r, 4), 0.5)
        self.draw(f"{prefix}qkv_w", (3 * D, D), 0.02)
        self.draw(f"{prefix}qkv_b", (3 * D,), 0.05)
        self.draw(f"{prefix}proj_w", (D, D), 0.02)
        self.draw(f"{prefix}proj_b", (D,), 0.05)

    def vit_block_mlp(self, prefix: str, r: int, modes: str) -> None:
        self.draw(f"{prefix}{modes}", (r, 8), 0.5)
        self.draw(f"{prefix}fc1_w", (4 * D, D), 0.02)
        self.draw(f"{prefix}fc1_b", (4 * D,), 0.05)
        self.draw(f"{prefix}fc2_w", (D, 4 * D), 0.02)
        self.draw(f"{prefix}fc2_b", (D,), 0.05)


def relative_error(found: torch.Tensor, want: torch.Tensor) -> float:
    return float((found.detach().double() - want).abs().max() / want.abs().max())
