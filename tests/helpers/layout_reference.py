"""SiT's layouts in NumPy, from their definitions: rotary positions, skip connections, merged tokens and latents, by index lists."""

import numpy as np
from reference import Reference, window_members


def rotate_head(x, row, column):
    """One head of one token: pairs (2i, 2i + 1) of the first half turn with the row, those of the second with the column."""
    half = len(x) // 2
    out = np.empty_like(x)
    for start, position in ((0, row), (half, column)):
        for i in range(half // 2):
            angle = position * 10000.0 ** (-2 * i / half)
            a, b = x[start + 2 * i], x[start + 2 * i + 1]
            out[start + 2 * i] = a * np.cos(angle) - b * np.sin(angle)
            out[start + 2 * i + 1] = a * np.sin(angle) + b * np.cos(angle)
    return out


def cells_by_four(grid):
    """Row-major indices of the four cells of every 2×2 square."""
    rows, columns = grid
    return [
        [(r + i) * columns + c + j for i in (0, 1) for j in (0, 1)] for r in range(0, rows, 2) for c in range(0, columns, 2)
    ]


def latents_by_four(groups, k):
    """Indices of up to four successive latents of a group."""
    return [[g * k + j for j in range(first, min(first + 4, k))] for g in range(groups) for first in range(0, k, 4)]


class LayoutReference(Reference):
    """`Reference` with rotary positions and RMS norm of queries and keys, in a layout; of ELIT's tail policies "drop" alone."""

    def __init__(self, weights, *, layout, **options):
        super().__init__(weights, **options)
        self.layout = layout

    def head_norm(self, name, x):
        heads = x.reshape(len(x), self.heads, -1)
        if name + ".scale" in self.w:
            heads = heads / np.sqrt((heads**2).mean(-1, keepdims=True) + 1e-6) * self.w[name + ".scale"]
        turned = [[rotate_head(head, *self.pos[n]) for head in heads[n]] for n in range(len(x))]
        return np.array(turned).reshape(x.shape)

    def _positions(self, grid):
        return 0

    def _blocks(self, x, cond, k, grid):
        self.pos = pos = [(r, c) for r in range(grid[0]) for c in range(grid[1])]
        self.left = []
        if self.elit is None:
            return self._run(x, cond, range(self.depth), cells_by_four(grid)), {}
        head, tail = self.elit["head_depth"], self.depth - self.elit["tail_depth"]
        x = self._run(x, cond, range(head), None)
        windows = window_members(*grid, self.elit["group_size"])
        k = k or self.elit["group_size"] ** 2
        tokens, latents = zip(*(self.read(x[members], cond, k) for members in windows), strict=True)
        self.pos = [pos[n] for members in windows for n in members[:k]]
        core = self._run(np.concatenate(latents), cond, range(head, tail), latents_by_four(len(windows), k))
        self.pos = pos
        x = np.empty_like(x)  # a new one: blocks may have left the old
        for g, members in enumerate(windows):
            x[members] = self.write(tokens[g], core[g * k : (g + 1) * k])
        return self._run(x, cond, range(tail, self.depth), None), {}

    def _run(self, x, cond, blocks, by_four):
        outer = 2 * self.depth // 7
        for i in blocks:
            mirrored = self.depth - 1 - i
            if self.layout == "hourglass" and i == outer:
                whole, whole_pos = x, self.pos
                x = self._merge(x, by_four)
            if self.layout == "unet" and i - mirrored > 1:
                x = self.linear(f"blocks.{i}.skip_linear", np.concatenate([x, self.left.pop()], axis=1))
            x = self.block(i, x, cond)
            if self.layout == "unet" and mirrored - i > 1:
                self.left.append(x)
            if self.layout == "hourglass" and i == self.depth - outer - 1:
                x, self.pos = self._split(x, whole, by_four), whole_pos
        return x

    def _merge(self, x, by_four):
        merged = np.zeros((len(by_four), 4 * x.shape[1]))
        for m, members in enumerate(by_four):
            merged[m, : len(members) * x.shape[1]] = x[members].reshape(-1)
        self.pos = [tuple(np.mean([self.pos[n] for n in members], axis=0)) for members in by_four]
        return merged @ self.w["hourglass.merge.weight"].T

    def _split(self, x, whole, by_four):
        out = np.empty_like(whole)
        for m, members in enumerate(by_four):
            parts = (self.w["hourglass.split.weight"] @ x[m]).reshape(4, -1)
            for part, n in zip(parts, members, strict=False):
                out[n] = whole[n] + self.w["hourglass.mix"] * (part - whole[n])
        return out
