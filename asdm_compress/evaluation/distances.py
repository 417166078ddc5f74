"""Distances between sets of images by their features: Fréchet, kernel (KID, CMMD), precision and recall, and the
inception score; each with resampled values for its interval.

The images of a model are resampled, the reference is held fixed. Of a teacher and a model at the same prompts and seeds
the same images are drawn in each resample, so that their difference has an interval of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from asdm_compress.evaluation import intervals
from asdm_compress.evaluation.record import Estimate

Array = NDArray[np.float64]
NEIGHBOURS: Final = 3  # Kynkäänniemi et al. 2019
CMMD_SIGMA: Final = 10.0
CMMD_SCALE: Final = 1000.0
SPLITS: Final = 10  # of the inception score, as it is published
_RESAMPLES: Final = 200
_COSTLY: Final = 50  # resamples where each is a decomposition of a wide covariance
_WIDE: Final = 512
_WHOLE: Final = 4000  # images up to which a kernel's matrix is held
_ROWS: Final = 1024


class SetDistance(Protocol):
    """A distance of a set of images to a fixed reference."""

    least: float | None

    def counted(self, n: int) -> int:
        """How many of n images it takes in."""
        ...

    def value(self, features: Array) -> float:
        """Of all images (N, D)."""
        ...

    def resampled(self, features: Array) -> Array:
        """Of resamples of the images, the same ones for every set of the same size."""
        ...


def estimate(distance: SetDistance, features: Array) -> Estimate:
    """A distance with its interval."""
    n = distance.counted(len(features))
    return intervals.centred(distance.value(features), _resampled(distance, features), n, distance.least)


def estimates(distance: SetDistance, teacher: Array, model: Array) -> tuple[Estimate, Estimate, Estimate]:
    """The teacher's distance, the model's, and the difference of the two."""
    values, draws = [], []
    for features in (teacher, model):
        values.append(distance.value(features))
        draws.append(_resampled(distance, features))
    n = distance.counted(len(model))
    ends = [intervals.centred(v, d, n, distance.least) for v, d in zip(values, draws, strict=True)]
    return ends[0], ends[1], intervals.centred(values[1] - values[0], draws[1] - draws[0], n)


def _resampled(distance: SetDistance, features: Array) -> Array:
    return distance.resampled(features) if len(features) > 1 else np.empty(0)


@dataclass(frozen=True, slots=True)
class Moments:
    """Mean (D,) and covariance of a set of features, the latter as a factor F (D, R) with Σ = F Fᵀ."""

    mean: Array
    factor: Array

    @staticmethod
    def of(features: Array) -> Moments:
        """Of features (N, D), N ≥ 2. Of few, the centred features are the factor, and nothing is decomposed."""
        mean = features.mean(axis=0)
        rows = (features - mean) / np.sqrt(len(features) - 1)
        return Moments(mean, rows.T) if len(rows) < rows.shape[1] else Moments.from_covariance(mean, rows.T @ rows)

    @staticmethod
    def from_covariance(mean: Array, covariance: Array) -> Moments:
        """Of moments that are known already."""
        values, vectors = np.linalg.eigh(covariance)
        return Moments(mean, vectors * np.sqrt(values.clip(0)))


class Frechet:
    """‖μ₁ - μ₂‖² + tr(Σ₁ + Σ₂ - 2 (Σ₁ Σ₂)^½) (Heusel et al., 1706.08500, eq. 6).

    With Σ₂ = F Fᵀ the last term is the sum of the singular values of the centred features times F: exact for fewer
    images than features too, where a root of the product is not.
    """

    least: float | None = 0.0

    def __init__(self, reference: Moments) -> None:
        self.mean, self.factor = reference.mean, reference.factor
        self.trace = float(np.square(self.factor).sum())

    def counted(self, n: int) -> int:
        """All of them."""
        return n

    def value(self, features: Array) -> float:
        """Of images' features (N, D), N ≥ 2."""
        return self._weighted(features, np.ones(len(features)))

    def resampled(self, features: Array) -> Array:
        """Of resamples."""
        count = _COSTLY if min(len(features), self.factor.shape[1]) > _WIDE else _RESAMPLES
        weights = intervals.resampling_weights(len(features), count)
        return np.array([self._weighted(features, w.astype(float)) for w in weights])

    def _weighted(self, features: Array, weights: Array) -> float:
        kept = weights > 0
        features, weights = features[kept], weights[kept]
        total = weights.sum()
        mean = weights @ features / total
        rows = (features - mean) * np.sqrt(weights / (total - 1))[:, None]
        product = rows @ self.factor
        if len(product) > 4 * product.shape[1]:
            cross = np.sqrt(np.linalg.eigvalsh(product.T @ product).clip(0)).sum()
        else:
            cross = np.linalg.svd(product, compute_uv=False).sum()
        apart = mean - self.mean
        return float(apart @ apart + np.square(rows).sum() + self.trace - 2 * cross)


def frechet_distance(first: Array, second: Array) -> float:
    """The Fréchet distance of two feature sets (N, D)."""
    return Frechet(Moments.of(second)).value(first)


def polynomial(first: Tensor, second: Tensor) -> Tensor:
    """(x·y / D + 1)³, the kernel of KID (Bińkowski et al., 1801.01401)."""
    return (first @ second.T / first.shape[1] + 1) ** 3


def gaussian(first: Tensor, second: Tensor) -> Tensor:
    """exp(-‖x - y‖² / 2σ²) with CMMD's σ (Jayasumana et al., 2401.09603)."""
    return torch.exp(-torch.cdist(first, second).square() / (2 * CMMD_SIGMA**2))


class Kernel:
    """Squared maximum mean discrepancy to a reference (N, D).

    `unbiased` leaves a feature's product with itself out, as KID does; CMMD's published code keeps it in.
    """

    def __init__(
        self,
        reference: Array,
        kernel: Callable[[Tensor, Tensor], Tensor] = polynomial,
        unbiased: bool = True,
        scale: float = 1.0,
    ) -> None:
        self.reference, self.kernel, self.unbiased, self.scale = torch.from_numpy(reference), kernel, unbiased, scale
        self.least: float | None = None if unbiased else 0.0
        self.within = self._mean_within(*self._row_sums(self.reference, self.reference, own=True))

    def counted(self, n: int) -> int:
        """All of them."""
        return n

    def value(self, features: Array) -> float:
        """Of images' features (N, D), N ≥ 2."""
        images = torch.from_numpy(features)
        within = self._mean_within(*self._row_sums(images, images, own=True))
        across, _ = self._row_sums(images, self.reference)
        return self.scale * float(within + self.within - 2 * across.mean() / len(self.reference))

    def resampled(self, features: Array) -> Array:
        """Of resamples; a large set's by each image's own part in the distance."""
        images, n = torch.from_numpy(features), len(features)
        weights = torch.from_numpy(intervals.resampling_weights(n, _RESAMPLES)).double()
        across = self._row_sums(images, self.reference)[0] / len(self.reference)
        if n > _WHOLE:
            rows, own = self._row_sums(images, images, own=True)
            parts = 2 * ((rows - own) / (n - 1) - across)
            return (self.scale * (weights @ parts) / n).numpy()
        matrix = self.kernel(images, images)
        pairs = ((weights @ matrix) * weights).sum(1)
        # An image drawn twice makes no pair with itself.
        alone = weights.square() @ matrix.diag() if self.unbiased else 0.0
        count = n - 1 if self.unbiased else n
        return (self.scale * ((pairs - alone) / count**2 - 2 * weights @ across / n)).numpy()

    def _row_sums(self, first: Tensor, second: Tensor, own: bool = False) -> tuple[Tensor, Tensor]:
        """Sums of the kernel over the second set for each of the first, and each one's product with itself."""
        sums = [self.kernel(part, second).sum(1) for part in torch.split(first, _ROWS)]
        selves = [self.kernel(one[None], one[None])[0, 0] for one in first] if own else []
        return torch.cat(sums), torch.stack(selves) if own else torch.empty(0)

    def _mean_within(self, sums: Tensor, own: Tensor) -> float:
        n = len(sums)
        return float((sums - own).sum() / (n * (n - 1)) if self.unbiased else sums.sum() / n**2)


class PairedKernel:
    """The unbiased squared MMD to a reference (N, D) whose images are of the same prompts and seeds, row by row.

    Pairs are no independent draws: the product of an image with its own partner is left out too, as in the one-sample
    U-statistic (Gretton et al., JMLR 2012, lemma 6, eq. 4), where the estimate of two sets would be too low. Of more
    than 4000 pairs the first ones are taken, whose matrix can be held.
    """

    least: float | None = None

    def __init__(self, reference: Array, kernel: Callable[[Tensor, Tensor], Tensor] = polynomial) -> None:
        self.reference, self.kernel = torch.from_numpy(reference[:_WHOLE]), kernel

    def counted(self, n: int) -> int:
        """Those whose matrix can be held."""
        return min(n, _WHOLE)

    def value(self, features: Array) -> float:
        """Of the partners' features (N, D), N ≥ 2."""
        matrix = self._matrix(features)
        return float(matrix.sum() / (len(matrix) * (len(matrix) - 1)))

    def resampled(self, features: Array) -> Array:
        """Of resamples of the pairs."""
        matrix = self._matrix(features)
        n = len(matrix)
        weights = torch.from_numpy(intervals.resampling_weights(n, _RESAMPLES)).double()
        return (((weights @ matrix) * weights).sum(1) / (n - 1) ** 2).numpy()

    def _matrix(self, features: Array) -> Tensor:
        """k(x_i, x_j) + k(y_i, y_j) - k(x_i, y_j) - k(x_j, y_i), and nothing where i = j."""
        images = torch.from_numpy(features[:_WHOLE])
        across = self.kernel(images, self.reference)
        whole = self.kernel(images, images) + self.kernel(self.reference, self.reference) - across - across.T
        return whole.fill_diagonal_(0)


def kernel_distance(first: Array, second: Array) -> float:
    """The unbiased kernel distance of two feature sets (N, D), as KID has it over all images at once."""
    return Kernel(second).value(first)


def neighbourhoods(features: Array, neighbours: int = NEIGHBOURS) -> Array:
    """The distance of each feature to its k-th nearest other, (N,)."""
    points = torch.from_numpy(features)
    nearest = [torch.cdist(part, points).kthvalue(neighbours + 1).values for part in torch.split(points, _ROWS)]
    return torch.cat(nearest).numpy()


def inside(features: Array, others: Array, radii: Array) -> NDArray[np.bool_]:
    """Which features (N, D) lie within the neighbourhood of at least one of the others (M, D)."""
    points, reach = torch.from_numpy(others), torch.from_numpy(radii)
    parts = torch.split(torch.from_numpy(features), _ROWS)
    found = torch.cat([(torch.cdist(part, points) <= reach).any(1) for part in parts])
    return np.asarray(found.numpy(), dtype=np.bool_)


def precision_and_recall(images: Array, reference: Array) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Which images lie among the reference, and which of the reference among the images.

    Improved precision and recall (Kynkäänniemi et al., 1904.06991, eqs. 1-2); their means are the two figures. Needs
    more than `NEIGHBOURS` of both.
    """
    among = inside(images, reference, neighbourhoods(reference))
    return among, inside(reference, images, neighbourhoods(images))


class InceptionScore:
    """exp(E KL(p(y|x) ‖ p(y))) (Salimans et al., 1606.03498), the mean over parts of the images; features are logits.

    As many parts as published, one where there are too few images for them.
    """

    least: float | None = 1.0

    @staticmethod
    def parts(n: int) -> int:
        """Into how many parts n images are split."""
        return SPLITS if n >= 10 * SPLITS else 1

    def counted(self, n: int) -> int:
        """All of them."""
        return n

    def value(self, features: Array) -> float:
        """Of logits (N, classes)."""
        return float(self._scores(features, np.ones((1, len(features))))[0])

    def resampled(self, features: Array) -> Array:
        """Of resamples."""
        return self._scores(features, intervals.resampling_weights(len(features), _RESAMPLES).astype(float))

    def _scores(self, logits: Array, weights: Array) -> Array:
        log_p = torch.from_numpy(logits).log_softmax(1)
        p = log_p.exp()
        certainty = (p * log_p).sum(1)
        found: list[Tensor] = []
        n, parts = len(logits), self.parts(len(logits))
        for number in range(parts):  # as even as they can be
            rows = slice(number * n // parts, (number + 1) * n // parts)
            drawn = torch.from_numpy(weights)[:, rows]
            drawn = drawn / drawn.sum(1, keepdim=True).clamp(min=1)
            marginal = drawn @ p[rows]
            entropy = torch.special.entr(marginal).sum(1)
            found.append((drawn @ certainty[rows] + entropy).exp())
        return torch.stack(found).mean(0).numpy()
