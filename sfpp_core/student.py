"""The causal student: Wan 2.1's transformer, one chunk at a time, over a memory of its own past.

Works over any modules with Wan's names: ``WanNetwork``, or the layers a host has loaded. Layers are called,
their weights never read, so a host's casting, LoRA patches and offloading stay the host's.

Legend: B batch, C channels, T latent frames, H and W latent height and width, S tokens per latent frame,
L tokens = T * S, N heads, D head dim.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .attention import Attend, sdpa
from .conditioning import fit_text
from .config import StudentConfig
from .geometry import PATCH
from .kv_cache import KVCache, OpenChunk
from .rope import exact_device, rotate, rotation

ReadParameter = Callable[[Tensor], Tensor]
"""Reads a bare parameter of the network (the modulations), wherever the host keeps it."""


def sigma_embedding(sigma: Tensor, freq_dim: int) -> Tensor:
    """Return cosines, then sines, of ``1000 * sigma``: ``(...)`` becomes ``(..., freq_dim)``, float64."""
    half = freq_dim // 2
    frequencies = 10_000.0 ** -(torch.arange(half, dtype=torch.float64, device=sigma.device) / half)
    angles = 1000 * sigma.double().unsqueeze(-1) * frequencies
    return torch.cat((angles.cos(), angles.sin()), dim=-1)


@dataclass(frozen=True, slots=True)
class Modulation:
    """All that depends on sigma and on nothing else: one table per sigma, shared by every token.

    Each vector has shape ``(B, T, 1, dim)`` with B and T 1 unless sigma varies; scales already have their 1
    added.
    """

    layers: list[tuple[Tensor, ...]]
    """Per layer: shift, scale and gate of the self-attention, then of the feed-forward."""

    head: tuple[Tensor, Tensor]
    """Shift and scale of the head."""


class WholeClip:
    """Open chunk with no past: attention sees the whole clip, or what ``mask`` lets each token see."""

    def __init__(self, mask: Tensor | None = None) -> None:
        """Keep ``mask`` ``(L, L)``, true where a query (row) may see a key; ``None`` hides nothing."""
        self.first = 0
        self.mask = mask

    def write(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:  # noqa: ARG002 - the protocol's
        """Return ``k`` and ``v``: there is nothing else to see."""
        return k, v


def causal_mask(latent_frames: int, tokens: int, *, chunk: int, window: int, sink: int = 0) -> Tensor:
    """Return the mask under which one forward sees what a rollout of chunks would.

    Args:
        latent_frames: Latent frames in the clip.
        tokens: Tokens per latent frame.
        chunk: Latent frames generated together.
        window: Latent frames attention sees, the chunk itself and the sink included.
        sink: First latent frames always in sight.

    Returns:
        ``(L, L)``, true where the query (row) may see the key (column).
    """
    index = torch.arange(latent_frames * tokens) // (tokens * chunk)
    query, key = index[:, None], index[None]
    recent = key > query - (window - sink) // chunk
    return (key <= query) & (recent | (key < sink // chunk))


class CausalStudent:
    """A Wan 2.1 transformer that generates chunk by chunk.

    Use::

        student = CausalStudent(network, config).bind(embeddings)
        velocity = student(noisy, sigma, cache)     # a denoising pass of the open chunk
        student.remember(clean, cache)              # the pass whose keys and values stay
    """

    def __init__(
        self,
        network: Any,
        config: StudentConfig,
        *,
        attend: Attend = sdpa,
        dtype: torch.dtype | None = None,
        patch_dtype: torch.dtype | None = None,
        read: ReadParameter = lambda parameter: parameter,
        checkpointing: bool = False,
    ) -> None:
        """Wrap ``network``.

        Args:
            network: Modules with Wan's names.
            config: Its architecture.
            attend: Attention back end of the self-attention.
            dtype: Compute dtype; ``None`` takes that of the patch embedding.
            patch_dtype: Dtype the patch embedding is fed in, where it differs.
            read: Reads the bare modulation parameters.
            checkpointing: Recompute each layer in backward instead of keeping its activations.
        """
        self.network = network
        self.config = config
        self.attend = attend
        self.dtype = dtype or network.patch_embedding.weight.dtype
        self.patch_dtype = patch_dtype or self.dtype
        self.read = read
        self.checkpointing = checkpointing

    def bind(self, embeddings: Tensor) -> "BoundStudent":
        """Return the student of one prompt: its text keys and values are computed here, once.

        Args:
            embeddings: Text embeddings, ``(B, tokens, text_dim)``; padded with zeros to the length the
                student knows.

        Raises:
            ConditioningError: The embeddings do not fit the student.
        """
        text = self.network.text_embedding(fit_text(embeddings, self.config).to(self.dtype))
        pairs = []
        for layer in self.network.blocks:
            cross = layer.cross_attn
            pairs.append((self._heads(cross.norm_k(cross.k(text))), self._heads(cross.v(text))))
        return BoundStudent(self, pairs)

    def _heads(self, x: Tensor) -> Tensor:
        """Split ``(B, L, dim)`` into heads, ``(B, N, L, D)``."""
        return x.unflatten(-1, (self.config.heads, -1)).transpose(1, 2)

    def modulation(self, sigma: Tensor) -> Modulation:
        """Return the table of ``sigma`` ``(B, T)``; B and T may be 1."""
        device = self.read(self.network.head.modulation).device
        embedding = sigma_embedding(sigma.to(exact_device(device)), self.config.freq_dim).to(self.dtype)
        time = self.network.time_embedding(embedding.to(device))
        shared = self.network.time_projection(time).unflatten(-1, (6, -1))
        layers = []
        for layer in self.network.blocks:
            shift1, scale1, gate1, shift2, scale2, gate2 = (shared + self._bare(layer.modulation)).split(
                1, dim=2
            )
            layers.append((shift1, 1 + scale1, gate1, shift2, 1 + scale2, gate2))
        shift, scale = (time.unsqueeze(2) + self._bare(self.network.head.modulation)).split(1, dim=2)
        return Modulation(layers, (shift, 1 + scale))

    def _bare(self, parameter: Tensor) -> Tensor:
        """Read one modulation parameter in the compute dtype."""
        return self.read(parameter).to(self.dtype)


@dataclass(frozen=True, slots=True)
class _LayerPass:
    """One layer in one pass: all that its input does not bring along."""

    index: int

    layer: Any
    """The layer's modules, under Wan's names."""

    table: tuple[Tensor, ...]
    """Modulation of the layer, see ``Modulation.layers``."""

    opened: OpenChunk

    turns: Tensor
    """Rotations of the open chunk, ``(L, D / 2)``."""


class BoundStudent:
    """A student bound to its conditioning: the velocity model of one rollout."""

    def __init__(self, student: CausalStudent, text: list[tuple[Tensor, Tensor]]) -> None:
        self.student = student
        self._text = text
        self._tables: dict[float, Modulation] = {}
        self._turns: tuple[tuple[int, ...], Tensor] | None = None

    def __call__(self, noisy: Tensor, sigma: float | Tensor, cache: KVCache) -> Tensor:
        """Return the velocity at ``noisy`` ``(B, C, T, H, W)``, float32; writes the keys to ``cache``.

        ``sigma`` may be one number for each clip, ``(B,)``.
        """
        table = self._table(sigma)
        return self._head(self._layers(noisy, table, cache.opened), table, noisy)

    @torch.no_grad()
    def remember(self, clean: Tensor, cache: KVCache, *, sigma: float = 0.0) -> None:
        """Write the keys and values of ``clean`` ``(B, C, T, H, W)`` as the past later chunks will see.

        Stops after the last layer's keys and values: nothing else of this pass is used.
        """
        self._layers(clean, self._table(sigma), cache.opened, keys_only=True)

    def whole(self, noisy: Tensor, sigma: Tensor, *, mask: Tensor | None = None) -> Tensor:
        """Return the velocity of a clip in one forward: Wan's bidirectional mode, or causal under ``mask``.

        Args:
            noisy: Clip, ``(B, C, T, H, W)``.
            sigma: Share of noise, ``(B, T)``; either size may be 1.
            mask: ``(L, L)``, see ``causal_mask``; ``None`` lets every token see every other.

        Returns:
            Velocity, float32, shape of ``noisy``.
        """
        table = self.student.modulation(sigma)
        return self._head(self._layers(noisy, table, WholeClip(mask)), table, noisy)

    def _table(self, sigma: float | Tensor) -> Modulation:
        """Return the modulation of one sigma, from memory where no gradient is at stake."""
        if isinstance(sigma, Tensor):
            return self.student.modulation(sigma.view(-1, 1))
        if torch.is_grad_enabled():
            return self.student.modulation(torch.tensor([[sigma]]))
        if sigma not in self._tables:
            self._tables[sigma] = self.student.modulation(torch.tensor([[sigma]]))
        return self._tables[sigma]

    def _rotation(self, first: int, grid: tuple[int, int, int], like: Tensor) -> Tensor:
        """Return the rotation of the open chunk; all passes of one chunk share it."""
        key = (first, *grid)
        if self._turns is None or self._turns[0] != key:
            self._turns = key, rotation(self.student.config.head_dim, first, grid, like=like)
        return self._turns[1]

    def _layers(
        self, latent: Tensor, table: Modulation, opened: OpenChunk, *, keys_only: bool = False
    ) -> Tensor:
        """Return the residual stream after every layer, ``(B, T, S, dim)``."""
        student = self.student
        x = student.network.patch_embedding(latent.to(student.patch_dtype)).to(student.dtype)
        turns = self._rotation(opened.first, tuple(x.shape[2:]), x)
        x = x.flatten(3).permute(0, 2, 3, 1)
        last = student.config.layers - 1
        for index, layer in enumerate(student.network.blocks):
            at = _LayerPass(index, layer, table.layers[index], opened, turns)
            if keys_only and index == last:
                self._self_attention_keys(x, at)
            elif student.checkpointing and torch.is_grad_enabled():
                x = checkpoint(self._layer, x, at, use_reentrant=False)
            else:
                x = self._layer(x, at)
        return x

    def _layer(self, x: Tensor, at: _LayerPass) -> Tensor:
        """Return the residual stream after one layer, ``(B, T, S, dim)``."""
        layer = at.layer
        _, _, gate1, shift2, scale2, gate2 = at.table
        k, v, y = self._self_attention_keys(x, at)
        q = rotate(self.student._heads(layer.self_attn.norm_q(layer.self_attn.q(y))), at.turns)
        x = torch.addcmul(x, gate1, layer.self_attn.o(self._attend(q, k, v, at.opened)).view_as(x))
        y = layer.norm3(x).flatten(1, 2)
        q = self.student._heads(layer.cross_attn.norm_q(layer.cross_attn.q(y)))
        text_k, text_v = self._text[at.index]
        # Text is short: SDPA, whichever back end the long self-attention has.
        x = x + layer.cross_attn.o(sdpa(q, text_k, text_v).transpose(1, 2).flatten(2)).view_as(x)
        return torch.addcmul(x, gate2, layer.ffn(torch.addcmul(shift2, layer.norm2(x), scale2)))

    def _self_attention_keys(self, x: Tensor, at: _LayerPass) -> tuple[Tensor, Tensor, Tensor]:
        """Write keys and values of one layer; return all in sight and the modulated input ``(B, L, dim)``."""
        attention, (shift, scale, *_) = at.layer.self_attn, at.table
        y = torch.addcmul(shift, at.layer.norm1(x), scale).flatten(1, 2)
        k = rotate(self.student._heads(attention.norm_k(attention.k(y))), at.turns)
        k, v = at.opened.write(at.index, k, self.student._heads(attention.v(y)))
        return k, v, y

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, opened: OpenChunk) -> Tensor:
        """Attend over all in sight and join the heads, ``(B, L, dim)``."""
        if isinstance(opened, WholeClip) and opened.mask is not None:
            mask = opened.mask.to(q.device)
            out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        else:
            out = self.student.attend(q, k, v)
        return out.transpose(1, 2).flatten(2)

    def _head(self, x: Tensor, table: Modulation, like: Tensor) -> Tensor:
        """Project the residual stream to a velocity of the shape of ``like``."""
        shift, scale = table.head
        head = self.student.network.head
        patches = head.head(torch.addcmul(shift, head.norm(x), scale))
        height, width = (size // PATCH for size in like.shape[3:])
        patches = patches.unflatten(3, (PATCH, PATCH, -1)).unflatten(2, (height, width))
        # B T h w p q C -> B C T (h p) (w q)
        return patches.permute(0, 6, 1, 2, 4, 3, 5).flatten(5).flatten(3, 4).float()
