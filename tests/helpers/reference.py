"""SiT and ELIT-SiT in NumPy float64, written from the papers' definitions: slow loops, one sample and one group at a time."""

import numpy as np


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def silu(x):
    return x * sigmoid(x)


def gelu_tanh(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def layer_norm(x, eps):
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + eps)


def rms_norm(x, scale):
    return scale * x / (np.sqrt((x**2).mean(-1, keepdims=True)) + 1e-5)


def attention(q, k, v, heads):
    """Scaled dot-product attention of one sequence: q (Q, D), k and v (K, D) → (Q, D)."""
    width = q.shape[1] // heads
    out = np.zeros_like(q)
    for h in range(heads):
        part = slice(h * width, (h + 1) * width)
        for i in range(len(q)):
            logits = k[:, part] @ q[i, part] / np.sqrt(width)
            weights = np.exp(logits - logits.max())
            out[i, part] = (weights / weights.sum()) @ v[:, part]
    return out


def position_table(rows, columns, dim):
    """(rows·columns, dim): first half of the channels from the column, second half from the row; each [sin, cos]."""
    table = np.zeros((rows * columns, dim))
    quarter = dim // 4
    for r in range(rows):
        for c in range(columns):
            for k in range(quarter):
                frequency = 10000.0 ** (-k / quarter)
                entry = table[r * columns + c]
                entry[k], entry[quarter + k] = np.sin(c * frequency), np.cos(c * frequency)
                entry[2 * quarter + k], entry[3 * quarter + k] = np.sin(r * frequency), np.cos(r * frequency)
    return table


def window_members(rows, columns, g):
    """For every g×g window in row-major order, the indices of its tokens in row-major order."""
    windows = []
    for top in range(0, rows, g):
        for left in range(0, columns, g):
            windows.append([(top + i) * columns + left + j for i in range(g) for j in range(g)])
    return windows


class Reference:
    """The two models for the weights of a state dict (name → array).

    `elit`: None for SiT, else a dict with group_size, head_depth, tail_depth, tail, read_depth, write_depth, and write ("paper" or "published").
    """

    def __init__(self, weights, *, heads, patch_size, elit=None):
        self.w = {k: np.asarray(v, dtype=np.float64) for k, v in weights.items()}
        self.heads, self.p, self.elit = heads, patch_size, elit
        self.depth = 1 + max(int(k.split(".")[1]) for k in self.w if k.startswith("blocks."))

    def linear(self, name, x):
        y = x @ self.w[name + ".weight"].T
        return y + self.w[name + ".bias"] if name + ".bias" in self.w else y

    def mlp(self, name, x):
        return self.linear(name + ".fc2", gelu_tanh(self.linear(name + ".fc1", x)))

    def condition(self, t, y):
        return self.time(t, "t_embedder") + self.w["y_embedder.embedding_table.weight"][y]

    def time(self, t, name):
        features = np.zeros(256)
        for i in range(128):
            angle = t * np.exp(-np.log(10000) * i / 128)
            features[i], features[128 + i] = np.cos(angle), np.sin(angle)
        return self.linear(f"{name}.mlp.2", silu(self.linear(f"{name}.mlp.0", features)))

    def head_norm(self, name, x):
        """qk_norm: LayerNorm over the width of each head, eps 1e-5, where there is one."""
        if name + ".weight" not in self.w:
            return x
        x = x.reshape(len(x), self.heads, -1)
        return (layer_norm(x, 1e-5) * self.w[name + ".weight"] + self.w[name + ".bias"]).reshape(len(x), -1)

    def block(self, i, x, c):
        name = f"blocks.{i}"
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = np.split(self.linear(f"{name}.adaLN_modulation.1", silu(c)), 6)
        q, k, v = np.split(self.linear(f"{name}.attn.qkv", layer_norm(x, 1e-6) * (1 + scale_a) + shift_a), 3, axis=1)
        q, k = self.head_norm(f"{name}.attn.q_norm", q), self.head_norm(f"{name}.attn.k_norm", k)
        x = x + gate_a * self.linear(f"{name}.attn.proj", attention(q, k, v, self.heads))
        return x + gate_m * self.mlp(f"{name}.mlp", layer_norm(x, 1e-6) * (1 + scale_m) + shift_m)

    def cross_attention(self, name, queries, context):
        q = rms_norm(self.linear(f"{name}.q_proj", queries), self.w[f"{name}.q_norm.scale"])
        k, v = np.split(self.linear(f"{name}.kv_proj", context), 2, axis=1)
        k = rms_norm(k, self.w[f"{name}.k_norm.scale"])
        return self.linear(f"{name}.proj", attention(q, k, v, self.heads))

    def read(self, x, c, made):
        """One group: tokens (J, D) → tokens with read_pos, and the first `made` latents without latent_pos."""
        name = "interface.reader"
        shift_p, scale_p, gate_a, shift_m, scale_m, gate_m = np.split(self.linear(f"{name}.adaLN_modulation.1", silu(c)), 6)
        x = x + self.w["interface.read_pos"]
        z = self.w["interface.query"][:made]
        for layer in range(self.elit["read_depth"]):
            context = layer_norm(x, 1e-6) * (1 + scale_p) + shift_p
            z = z + gate_a * self.cross_attention(f"{name}.attn.{layer}", z, context)
            z = z + gate_m * self.mlp(f"{name}.mlp.{layer}", layer_norm(z, 1e-6) * (1 + scale_m) + shift_m)
        return x, z

    def write(self, x, z):
        """One group: tokens (J, D) as `read` left them and latents (n, D) → tokens (J, D)."""
        x = x + self.w["interface.write_pos"]
        normed = (lambda a: layer_norm(a, 1e-6)) if self.elit.get("write") == "paper" else lambda a: a
        for layer in range(self.elit["write_depth"]):
            x = x + self.cross_attention(f"interface.writer.attn.{layer}", normed(x), normed(z))
            x = x + self.mlp(f"interface.writer.mlp.{layer}", normed(x))
        return x

    def forward(self, x, t, y, k=None):
        """x (B, C, H, W), t (B,), y (B,), k latents kept per group → velocity like x, and the tokens after each token block.

        The tokens are a dict: number of the block (from 1) → (B, N, D).
        """
        outputs, tokens = [], {}
        for sample in range(len(x)):
            out, seen = self._forward_one(np.asarray(x[sample], dtype=np.float64), float(t[sample]), int(y[sample]), k)
            outputs.append(out)
            for block, value in seen.items():
                tokens.setdefault(block, []).append(value)
        return np.stack(outputs), {block: np.stack(values) for block, values in tokens.items()}

    def _forward_one(self, image, t, y, k):
        grid = tuple(side // self.p for side in image.shape[1:])
        x = self._patches("x_embedder.proj", image, self.p) + self._positions(grid)
        cond = self.condition(t, y)
        x, seen = self._blocks(x, cond, k, grid)
        return self._final("final_layer", x, cond, self.p, image.shape), seen

    def _patches(self, name, image, p):
        rows, columns = (side // p for side in image.shape[1:])
        weight = self.w[f"{name}.weight"]
        x = np.zeros((rows * columns, len(weight)))
        for r in range(rows):
            for c in range(columns):
                patch = image[:, r * p : (r + 1) * p, c * p : (c + 1) * p]
                x[r * columns + c] = (weight * patch).sum((1, 2, 3)) + self.w[f"{name}.bias"]
        return x

    def _positions(self, grid):
        return position_table(*grid, self.w["y_embedder.embedding_table.weight"].shape[1]).astype(np.float32)

    def _blocks(self, x, cond, k, grid):
        seen = {}
        head = self.depth if self.elit is None else self.elit["head_depth"]
        for i in range(head):
            x = seen[i + 1] = self.block(i, x, cond)
        if self.elit is not None:
            x = self._core(x, cond, k, window_members(*grid, self.elit["group_size"]))
            for i in range(self.depth - self.elit["tail_depth"], self.depth):
                x = seen[i + 1] = self.block(i, x, cond)
        return x, seen

    def _final(self, name, x, cond, p, shape):
        shift, scale = np.split(self.linear(f"{name}.adaLN_modulation.1", silu(cond)), 2)
        x = self.linear(f"{name}.linear", layer_norm(x, 1e-6) * (1 + scale) + shift)
        out = np.zeros(shape)
        for n in range(len(x)):
            r, c = divmod(n, shape[2] // p)
            patch = x[n].reshape(p, p, shape[0])
            for i in range(p):
                for j in range(p):
                    out[:, r * p + i, c * p + j] = patch[i, j]
        return out

    def _core(self, x, cond, k, windows):
        J = self.elit["group_size"] ** 2
        k = J if k is None else k
        made = J if self.elit["tail"] == "skip" else k
        tokens, latents = zip(*(self.read(x[members], cond, made) for members in windows), strict=True)
        latents = [z + self.w["interface.latent_pos"][g][:made] for g, z in enumerate(latents)]
        core = np.concatenate([z[:k] for z in latents])
        for i in range(self.elit["head_depth"], self.depth - self.elit["tail_depth"]):
            core = self.block(i, core, cond)
        out = np.zeros_like(x)
        for g, members in enumerate(windows):
            z = np.concatenate([core[g * k : (g + 1) * k], latents[g][k:]])
            out[members] = self.write(tokens[g], z)
        return out


def halve(x):
    """(C, H, W) → (C, H/2, W/2): bilinear without antialiasing, whose sample points lie in the middle of four pixels."""
    return (x[:, ::2, ::2] + x[:, 1::2, ::2] + x[:, ::2, 1::2] + x[:, 1::2, 1::2]) / 4


def double(x):
    """(C, h, w) → (C, 2h, 2w): bilinear; each new pixel lies a quarter of an old one from its nearest, the border is repeated."""

    def along(x, axis):
        size = x.shape[axis]
        before = np.take(x, np.maximum(np.arange(size) - 1, 0), axis)
        after = np.take(x, np.minimum(np.arange(size) + 1, size - 1), axis)
        pairs = np.stack([0.75 * x + 0.25 * before, 0.75 * x + 0.25 * after], axis + 1)
        return pairs.reshape(*x.shape[:axis], 2 * size, *x.shape[axis + 1 :])

    return along(along(x, 1), 2)


def pyramid(x, stages):
    """The Laplacian pyramid of one image (C, H, W), coarsest stage first."""
    if stages == 1:
        return [x]
    low = halve(x)
    return [*pyramid(low, stages - 1), x - double(low)]


class StagedReference(Reference):
    """DFM, around SiT or ELIT: what is around the blocks exists once per stage."""

    def forward(self, stages, times, y, active, k=None):
        """stages: images (B, C, h, w), coarsest first; times (B, S) → the velocity of each stage up to `active`."""
        samples = []
        for b in range(len(y)):
            images = [np.asarray(stage[b], dtype=np.float64) for stage in stages]
            sizes = [self.p // 2 ** (len(images) - 1 - s) for s in range(len(images))]
            grid = tuple(side // self.p for side in images[-1].shape[1:])
            x = self._positions(grid)
            cond = self.w["y_embedder.embedding_table.weight"][int(y[b])]
            for s, (image, p) in enumerate(zip(images, sizes, strict=True)):
                x = x + self._patches(f"x_embedder.embedders.{s}.proj", image, p)
                cond = cond + self.time(float(times[b][s]), f"t_embedder.embedders.{s}")
            x, _ = self._blocks(x, cond, k, grid)
            outputs = zip(images[: active + 1], sizes, strict=False)
            samples.append(
                [self._final(f"final_layer.projections.{s}", x, cond, p, im.shape) for s, (im, p) in enumerate(outputs)]
            )
        return [np.stack(stage) for stage in zip(*samples, strict=True)]
