# B images, C channels, Z latent channels per group, G groups; H, W of the current scale.
"""NVAE: a bottom-up encoder, and one top-down walk over the latent groups.

Training, evaluation and sampling take the same walk (`_walk_down`): with the encoder's features
every group is drawn from its posterior, without them from its prior. The encoder is a call of
its own, so that many importance-weighted draws share one pass of it.

Groups are numbered coarsest first, in the order of generation; the encoder meets them in
reverse. Submodules are registered in the order of the published parameters, which optimizer
states and spectral regularization follow.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nvae import batch_norm, pixels
from nvae.batch_norm import ActivationCheckpointing
from nvae.cells import CELL_FAMILIES, Cell, DecoderCombiner, Direction, EncoderCombiner, Operation
from nvae.config import NVAEConfig
from nvae.distributions import Likelihood, Noise, Normal, image_likelihood, logit_channels
from nvae.flows import FlowPair
from nvae.layers import Conv2d, at_least_float32, full_precision, shared_weights
from nvae.levers import PLAIN, Levers
from nvae.packing import ModelPacks
from nvae.spectral import Matrices, SpectralRegularization


@dataclass(frozen=True)
class Features:
    """What the bottom-up pass hands to each group's posterior, coarsest first."""

    per_group: tuple[Tensor, ...]


@dataclass(frozen=True)
class GroupOutput:
    """One latent group of a batch, drawn from its posterior; everything is fp32 or wider."""

    posterior: Normal
    """q(z given x and the coarser groups), before flows."""
    prior: Normal
    """p(z given the coarser groups)."""
    drawn: Tensor
    """The draw from `posterior`, (B, Z, H, W)."""
    z: Tensor
    """The latents that the decoder sees: `drawn` after the flows, if there are any."""
    kl_per_channel: Tensor
    """(B, Z) KL of the posterior from the prior in nats: analytic, or with flows one draw's
    log q - log p, which may be negative."""

    @property
    def kl(self) -> Tensor:
        """(B,) nats."""
        return self.kl_per_channel.sum(dim=1)

    @property
    def log_q(self) -> Tensor:
        """(B,) log-density of the latents under posterior and flows; these preserve volume.

        Computed when asked for: without flows, training never needs it.
        """
        return self.posterior.log_prob(self.drawn).sum(dim=(1, 2, 3))

    @property
    def log_p(self) -> Tensor:
        """(B,) log-density of the latents under the prior. Computed when asked for."""
        return self.prior.log_prob(self.z).sum(dim=(1, 2, 3))


@dataclass(frozen=True)
class Output:
    """What one pass over a batch of images gives."""

    likelihood: Likelihood
    groups: tuple[GroupOutput, ...]
    """Coarsest first."""


class EncoderGroup(nn.Module):
    """The bottom-up cells of one group, the combiner that its posterior uses on the way down,
    and after the last group of a scale the cell that halves the resolution."""

    def __init__(self, cells: list[Cell], combiner: EncoderCombiner | None, down: Cell | None) -> None:
        super().__init__()
        self.cells = nn.Sequential(*cells)
        self.combiner = combiner
        self.down = down


class DecoderGroup(nn.Module):
    """The top-down cells before one group, the combiner that takes in its latents, and after
    the last group of a scale the cell that doubles the resolution."""

    def __init__(self, cells: list[Cell], combiner: DecoderCombiner, up: Cell | None) -> None:
        super().__init__()
        self.cells = nn.Sequential(*cells)
        self.combiner = combiner
        self.up = up


class NVAE(nn.Module):
    """The model that `config` describes, with newly drawn weights.

    Plain VAE (`groups_per_scale` (1,)): no towers; one convolution turns the latents into the
    features of the first block after them.
    """

    def __init__(self, config: NVAEConfig) -> None:
        super().__init__()
        self.config = config
        self.levers = PLAIN
        self._packs: ModelPacks | None = None
        sizes = _Sizes(config)
        if not sizes.plain:
            self.initial_state = nn.Parameter(torch.rand(sizes.state(0), *config.latent_shapes[0][1:]))
            """The h of the paper: the state (C, H, W) before the first group."""
        self.stem = Conv2d(config.image_channels, config.encoder_channels, 3)
        self.preprocess = _preprocess(config)
        self.encoder_tower = _encoder_tower(config)
        self.encoder_head = Conv2d(sizes.features(0), sizes.features(0), 1)
        parameters = 2 * config.latent_channels
        self.posterior_heads = nn.ModuleList(
            Conv2d(sizes.features(group), parameters, 3) for group in range(config.num_groups)
        )
        self.prior_heads = nn.ModuleList(
            Conv2d(sizes.state(group), parameters, 1) for group in range(1, config.num_groups)
        )
        self.flows = nn.ModuleList(
            nn.Sequential(*(FlowPair(config.latent_channels) for _ in range(config.flow_pairs)))
            for _ in range(config.num_groups)
        )
        if sizes.plain:
            self.latent_projection = Conv2d(config.latent_channels, sizes.state(0), 1)
        self.decoder_tower = _decoder_tower(config)
        self.postprocess = _postprocess(config)
        self.image_head = Conv2d(config.decoder_channels, logit_channels(config), 3)
        self.spectral = SpectralRegularization(self)

    def forward(self, images: Tensor, noise: Noise) -> Output:
        """Encode and decode images (B, C, H, W), which are as `nvae.pixels.to_model` makes them.

        `noise` gives standard normal draws; it is called with (B, Z, H, W) once per group,
        coarsest first.
        """
        return self.decode(self.encode(images), noise)

    def encode(self, images: Tensor) -> Features:
        """The bottom-up pass: what all posteriors of these images are made from. Not random."""
        x = self.preprocess(self.stem(self._laid_out(pixels.centred(images, self.config))))
        features = []
        for index in reversed(range(len(self.encoder_tower))):
            group = self._encoder_group(index)
            x = group.cells(x)
            features.append(x)
            if group.down is not None:
                x = group.down(x)
        # The coarsest group's features pass through the head and meet no state from above.
        coarsest = F.elu(self.encoder_head(F.elu(x)))
        return Features((coarsest, *reversed(features[:-1])))

    def decode(self, features: Features, noise: Noise) -> Output:
        """Draw every group from its posterior; the distribution of images given the latents."""
        count = len(features.per_group[0])
        likelihood, groups = self._walk_down(features, count, noise, temperature=1.0)
        return Output(likelihood, groups)

    def sample(self, count: int, noise: Noise, temperature: float = 1.0) -> Likelihood:
        """Draw every group from its prior; the distribution of `count` images given the latents.

        `temperature` multiplies the standard deviation of every prior.
        """
        return self._walk_down(None, count, noise, temperature)[0]

    def use(self, levers: Levers) -> None:
        """Compute by these from now on; values stay the same but for rounding."""
        self.levers = levers
        for module in self.modules():
            if isinstance(module, Conv2d) and module.groups == module.in_channels == module.out_channels:
                module.own_gradient = levers.depthwise and module.bias is None

    def shared_weights(self) -> AbstractContextManager[Matrices]:
        """Within it every convolution computes its effective weight once; see `nvae.layers.shared_weights`.

        For one training step (forward pass and spectral penalty) or several forward passes without
        gradient. Gives what of them is stacked, for `spectral`.
        """
        return self.spectral.weights_by_shape() if self.levers.weights_by_shape else _shared_weights(self)

    @property
    def packs(self) -> ModelPacks:
        """Its parameters and buffers, each in one tensor, which they are views of from now on."""
        if self._packs is None:
            self._packs = ModelPacks(self)
        return self._packs

    def set_activation_checkpointing(self, mode: ActivationCheckpointing) -> None:
        """What the backward pass recomputes to save memory: "none", "batch_norm" or "cells"."""
        batch_norm.set_activation_checkpointing(self, mode)

    def _walk_down(
        self, features: Features | None, count: int, noise: Noise, temperature: float
    ) -> tuple[Likelihood, tuple[GroupOutput, ...]]:
        """From the coarsest group to the image; the groups' outputs only if there are features."""
        outputs = []
        state = None if self._plain else self._laid_out(self.initial_state.expand(count, -1, -1, -1))
        for group in range(self.config.num_groups):
            if group > 0:
                state = self._decoder_group(group).cells(state)
            prior_parameters = self._prior_parameters(group, state, count)
            eps = noise((count, *self.config.latent_shapes[group]))
            if features is None:
                z = Normal.soft_clamped(*prior_parameters, temperature).sample(eps)
            else:
                output = self._draw_posterior(group, features, state, prior_parameters, eps)
                outputs.append(output)
                z = output.z
            state = self._join(group, state, self._laid_out(z))
        logits = _float32_convolution(self.image_head, F.elu(self.postprocess(state)))
        return image_likelihood(logits, self.config), tuple(outputs)

    def _prior_parameters(self, group: int, state: Tensor | None, count: int) -> tuple[Tensor, Tensor]:
        """Means and log-sigmas (B, Z, H, W) of a group's prior, not yet clamped."""
        if group == 0 or state is None:
            zeros = self.stem.weight.new_zeros(count, *self.config.latent_shapes[group])
            return zeros, zeros
        mu, log_sigma = _float32_convolution(self.prior_heads[group - 1], F.elu(state)).chunk(2, dim=1)
        return mu, log_sigma

    def _draw_posterior(
        self,
        group: int,
        features: Features,
        state: Tensor | None,
        prior_parameters: tuple[Tensor, Tensor],
        eps: Tensor,
    ) -> GroupOutput:
        seen = features.per_group[group]
        combiner = self._encoder_group(group).combiner if group > 0 else None
        if combiner is not None:
            seen = combiner(seen, state)
        mu, log_sigma = _float32_convolution(self.posterior_heads[group], seen).chunk(2, dim=1)
        if self.config.residual_posterior:
            mu, log_sigma = mu + prior_parameters[0], log_sigma + prior_parameters[1]
        posterior = Normal.soft_clamped(mu, log_sigma)
        prior = Normal.soft_clamped(*prior_parameters)
        drawn = posterior.sample(eps)
        if not self.config.flow_pairs:
            kl = posterior.kl_from(prior).sum(dim=(2, 3))
            return GroupOutput(posterior, prior, drawn, drawn, kl)
        with full_precision(drawn.device):
            z = self.flows[group](drawn)
        kl = (posterior.log_prob(drawn) - prior.log_prob(z)).sum(dim=(2, 3))
        return GroupOutput(posterior, prior, drawn, z, kl)

    def _join(self, group: int, state: Tensor | None, z: Tensor) -> Tensor:
        """The state after a group's latents are known."""
        if state is None:
            projected: Tensor = self.latent_projection(z)
            return projected
        decoder = self._decoder_group(group)
        joined: Tensor = decoder.combiner(state, z)
        if decoder.up is not None:
            joined = decoder.up(joined)
        return joined

    def _laid_out(self, x: Tensor) -> Tensor:
        """In the memory format of the levers, which everything computed from it inherits."""
        return x.contiguous(memory_format=torch.channels_last) if self.levers.channels_last else x

    def _encoder_group(self, group: int) -> EncoderGroup:
        """Of a group by its number; the tower is in the order of the bottom-up pass."""
        found = self.encoder_tower[-1 - group]
        assert isinstance(found, EncoderGroup)
        return found

    def _decoder_group(self, group: int) -> DecoderGroup:
        found = self.decoder_tower[group]
        assert isinstance(found, DecoderGroup)
        return found

    @property
    def _plain(self) -> bool:
        return _Sizes(self.config).plain


@contextmanager
def _shared_weights(model: NVAE) -> Iterator[Matrices]:
    with shared_weights(model):
        yield {}


@dataclass(frozen=True)
class _Sizes:
    """Channels of each part; they double with every halving of the resolution."""

    config: NVAEConfig

    @property
    def plain(self) -> bool:
        return self.config.groups_per_scale == (1,)

    @property
    def scale_of_group(self) -> tuple[int, ...]:
        """The scale of each group, 0 = coarsest."""
        return tuple(
            scale for scale, groups in enumerate(self.config.groups_per_scale) for _ in range(groups)
        )

    def features(self, group: int) -> int:
        """Channels of the encoder's features at a group."""
        return self.config.encoder_channels << self._halvings(group)

    def state(self, group: int) -> int:
        """Channels of the decoder's state at a group."""
        return self.config.decoder_channels << self._halvings(group)

    def _halvings(self, group: int) -> int:
        above_finest = self.config.num_scales - 1 - self.scale_of_group[group]
        return self.config.preprocess_blocks + above_finest

    def changes_scale_after(self, group: int) -> bool:
        """Whether the next group in the order of generation is at a finer scale."""
        following = self.scale_of_group[group + 1 : group + 2]
        return following != () and following[0] != self.scale_of_group[group]


def _cell(
    config: NVAEConfig, channels: int, operations: tuple[Operation, ...], direction: Direction = "same"
) -> Cell:
    return Cell(
        channels,
        operations,
        direction=direction,
        squeeze_excitation=config.squeeze_excitation,
        forgetful=config.published_compatibility,
    )


def _preprocess(config: NVAEConfig) -> nn.Sequential:
    """Blocks that halve the resolution in their last cell."""
    operations = CELL_FAMILIES[config.cell_family].preprocess
    cells = []
    for block in range(config.preprocess_blocks):
        channels = config.encoder_channels << block
        cells += [_cell(config, channels, operations) for _ in range(config.preprocess_cells - 1)]
        cells.append(_cell(config, channels, operations, "down"))
    return nn.Sequential(*cells)


def _postprocess(config: NVAEConfig) -> nn.Sequential:
    """Blocks that double the resolution in their first cell."""
    operations = CELL_FAMILIES[config.cell_family].postprocess
    cells = []
    for block in range(config.preprocess_blocks):
        channels = config.decoder_channels << (config.preprocess_blocks - block)
        cells.append(_cell(config, channels, operations, "up"))
        cells += [_cell(config, channels // 2, operations) for _ in range(config.postprocess_cells - 1)]
    return nn.Sequential(*cells)


def _encoder_tower(config: NVAEConfig) -> nn.ModuleList:
    """One EncoderGroup per group, in the order of the bottom-up pass: finest first."""
    sizes, operations = _Sizes(config), CELL_FAMILIES[config.cell_family].encoder
    tower = nn.ModuleList()
    for group in [] if sizes.plain else reversed(range(config.num_groups)):
        width = sizes.features(group)
        cells = [_cell(config, width, operations) for _ in range(config.encoder_cells_per_group)]
        combiner = EncoderCombiner(sizes.state(group), width) if group > 0 else None
        ends_scale = group > 0 and sizes.changes_scale_after(group - 1)
        down = _cell(config, width, operations, "down") if ends_scale else None
        tower.append(EncoderGroup(cells, combiner, down))
    return tower


def _decoder_tower(config: NVAEConfig) -> nn.ModuleList:
    """One DecoderGroup per group, coarsest first."""
    sizes, operations = _Sizes(config), CELL_FAMILIES[config.cell_family].decoder
    tower = nn.ModuleList()
    for group in range(0 if sizes.plain else config.num_groups):
        width = sizes.state(group)
        count = config.decoder_cells_per_group if group > 0 else 0
        cells = [_cell(config, width, operations) for _ in range(count)]
        up = _cell(config, width, operations, "up") if sizes.changes_scale_after(group) else None
        tower.append(DecoderGroup(cells, DecoderCombiner(width, config.latent_channels), up))
    return tower


def _float32_convolution(convolution: nn.Module, x: Tensor) -> Tensor:
    """The parameters of a distribution, in fp32 or wider.

    In bf16 a mean near 1 is known to 1/256 only, which is half a bin of an 8-bit pixel.
    """
    with full_precision(x.device):
        result: Tensor = convolution(at_least_float32(x))
    return result
