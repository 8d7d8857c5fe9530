"""Barlow Twins: every channel agrees between two views, and no two channels say the same.

    python forks/barlowtwins.py --data ./food-11        python forks/barlowtwins.py        (the drawn toy set)

Paper       Jure Zbontar et al., "Barlow Twins: Self-Supervised Learning via Redundancy Reduction", ICML 2021,
            arXiv 2103.03230; code facebookresearch/barlowtwins
Idea        Two random views of an image go through the same network. Over the batch, each channel of one output
            is correlated with each channel of the other: this matrix is pulled towards the identity. The ones on
            its diagonal make the views agree, the zeros off it keep the channels from being copies of one.
Symbols     x1, x2  views (N, 3, S, S), the paper's Y^A, Y^B     f  backbone + projector
            z1, z2  f(x) (N, d), the paper's Z^A, Z^B            C  cross-correlation matrix (d, d)
            lambda  weight of the redundancy reduction           d  width of z
Map         Eq. 1 -> barlow_twins_loss() [E1] | Eq. 2 -> cross_correlation() [E2] | Algorithm 1 -> main() [A1]
            Section 2.2, architecture -> BarlowTwins, its views -> view() [S2.2]
Read on     Tab. 5  ImageNet after 300 epochs, 71.4 %: lambda 0, only the diagonal, 57.3; the redundancy term alone
                    0.1. Table 6: a stop-gradient costs 0.9 points, a predictor 1.2, both together 10.
            Fig. 2  Batches of 256 lose little.  Fig. 3  Weaker views cost more than they cost BYOL.
            Fig. 4  The wider z, the better, up to 16384; in other methods it soon saturates.
            App. A  Read as an information bottleneck: keep what an image says, lose what a distortion says.
Recipe      flag            paper, ImageNet    lightly, CIFAR-10   here
            --lr            LARS, 0.2 x bs/256 SGD 0.12 x bs/256   SGD; cifar as lightly, photos 0.12, untried
            --batch-size    2048               512                 photos 256 (one GPU), cifar 512
            --weight-decay  1.5e-6 (code 1e-6) 5e-4                cifar as lightly, photos 1e-4
            --epochs        1000               800                 photos 200, cifar 800
            warm-up         10 epochs          0                   likewise
            --lambd         5e-3               5e-3                5e-3
            --proj-layers   3                  2                   likewise
            --dim           8192               2048                2048, toy 64
            --blur1, 2      1.0, 0.1           0                   likewise
            --solarize      0.2                0                   cifar 0.2, as solo-learn's CIFAR recipe
            --min-crop      0.08               0.08                likewise; momentum 0.9 and cosine everywhere
Published   ImageNet, ResNet-50, linear: 73.2 % after 1000 epochs.
            CIFAR-10, ResNet-18: kNN (k 200) of the backbone on the test images 82.7 / 85.7 % after 200 / 800
            epochs (lightly's benchmark); linear, trained along, 92.1 % after 1000 (solo-learn, LARS).
Departures  1. ResNet-18, crops cut from packed images, bf16 on a GPU; the paper trains ResNet-50 on crops of 224 px.
            2. SGD, one rate for all weights, no warm-up on cifar; the paper has LARS, and a rate of its own
               (0.0048 x bs/256), without decay, for biases and BatchNorm; its cosine ends at a thousandth of the
               rate, not at 0. Their code says lambda 0.0051.
            3. As in the authors' code BatchNorm divides by a channel's length over the batch (Eq. 2), with its 1e-5.
            4. `toy` takes a lower rate, a narrower z, larger crops, no blur and no solarize.
            5. BatchNorm sees the batch of all processes on GPUs only; C is over all processes everywhere.
Health      The loss starts near d (unrelated outputs: C = 0) or below and falls towards 0. `same` is the mean of
            C_ii, 1 where the views agree; `others` the root mean square of C off the diagonal, 0 where no channel
            repeats another, 1 where all are copies of one. Two outputs of 64 images have 0.125 by chance.
            `toy`, 6 epochs, seed 0, --amp off: loss 6.8, same 0.87, others 0.52, kNN 72.4 % (63.9 after 2; untrained
            27.9). A wide z is too much for batches of 64 in so few steps: with --dim 256, 54.1 % after 4; with
            --dim 512 --lambd 0.02 --lr 0.2 the loss stays at chance and kNN is down to 23.3 after all 3 epochs.
            --lambd 0, after 2 of 6 epochs: same 0.94, others 0.94, so z collapses to one channel and its copies; kNN
            of the backbone does not suffer yet, 66.4 % against 63.9. Its end: not measured.
"""

import functools
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # where augment, common, harness and knn lie
import harness  # isort: skip  # noqa: E402  # before torch: how threads wait, where memory comes from
import torch  # noqa: E402
import torch.nn as nn  # noqa: E402
import torch.nn.functional as F  # noqa: E402

import augment  # noqa: E402
import common  # noqa: E402
import knn  # noqa: E402

# ------------------------------------------------------------------------------------------------
# Flags
# ------------------------------------------------------------------------------------------------

# The defaults that depend on the data: kind of data -> flag -> value. lr per 256 images.
RECIPES = {
    "toy": dict(image_size=32, stem="cifar", width=16, epochs=6, batch_size=64, lr=0.1, weight_decay=1e-4,
                warmup_epochs=0.6, proj_layers=3, dim=64, lambd=5e-3, min_crop=0.4, blur1=0.0, blur2=0.0,
                solarize=0.0, knn_every=1),
    "cifar": dict(image_size=32, stem="cifar", width=64, epochs=800, batch_size=512, lr=0.12, weight_decay=5e-4,
                  warmup_epochs=0.0, proj_layers=2, dim=2048, lambd=5e-3, min_crop=0.08, blur1=0.0, blur2=0.0,
                  solarize=0.2, knn_every=5),
    "stl10": dict(image_size=96, stem="imagenet", width=64, epochs=200, batch_size=256, lr=0.12, weight_decay=1e-4,
                  warmup_epochs=10.0, proj_layers=3, dim=2048, lambd=5e-3, min_crop=0.08, blur1=1.0, blur2=0.1,
                  solarize=0.2, knn_every=5),
    "photos": dict(image_size=128, stem="imagenet", width=64, epochs=200, batch_size=256, lr=0.12, weight_decay=1e-4,
                   warmup_epochs=10.0, proj_layers=3, dim=2048, lambd=5e-3, min_crop=0.08, blur1=1.0, blur2=0.1,
                   solarize=0.2, knn_every=5),
}


def parse_args(argv=None):
    parser = harness.training_parser(__file__, __doc__, RECIPES)
    add = parser.flag
    add("--min-crop", "smallest crop, fraction of the picture's area; too small: two crops share nothing",
        type=harness.number(float, above=0, high=1))
    add("--blur1", "chance of a Gaussian blur, first view; not at 32 px", type=harness.number(float, low=0, high=1))
    add("--blur2", "the same of the second view", type=harness.number(float, low=0, high=1))
    add("--solarize", "chance of inverted bright pixels, second view", type=harness.number(float, low=0, high=1))
    add("--proj-layers", "layers of the projector", type=int, choices=(2, 3))
    add("--dim", "d, width of z and of the projector's hidden layers; the wider the better, in the paper",
        type=harness.number(int, low=2))
    add("--lambd", "lambda, weight of the redundancy reduction; ablation: 0, nothing keeps the channels of z apart",
        type=harness.number(float, low=0))
    return harness.parse(parser, argv)


# ------------------------------------------------------------------------------------------------
# Views (Section 2.2 "Image augmentations": those of BYOL)
# ------------------------------------------------------------------------------------------------


def view(images, aspect, generator, args, mean, std, blur, solarize):
    """One random view of every image, each with its own draw.                                      [S2.2]

    images   (N, 3, H, H) uint8, as packed.  aspect (N,) original width / height.  generator: common.Draws.
    blur, solarize   their chances: in these alone the two views differ.
    returns  (N, 3, S, S) float32, normalised, channels_last; S is --view-size, else --image-size.
    """
    x = augment.random_resized_crop(images, args.view_size or args.image_size, scale=(args.min_crop, 1.0), flip=0.5,
                                    aspect=aspect, interpolation="bicubic", generator=generator)
    x = augment.color_jitter(x, 0.4, 0.4, 0.2, 0.1, p=0.8, generator=generator, inplace=True)
    x = augment.random_grayscale(x, p=0.2, generator=generator, inplace=True)
    x = augment.gaussian_blur(x, sigma=(0.1, 2.0), p=blur, generator=generator, inplace=True)
    x = augment.solarize(x, p=solarize, generator=generator, inplace=True)
    return augment.normalize(x, mean, std)


# ------------------------------------------------------------------------------------------------
# Model
# ------------------------------------------------------------------------------------------------


class BarlowTwins(nn.Module):
    """Encoder f = backbone, and projector.                                                         [S2.2]

    backbone     maps x to (N, backbone.dim).
    dim          d, the width of z and of the hidden layers.  proj_layers: 2 or 3.
    forward(x)   (N, 3, S, S) -> z (N, d), not normalised yet: the loss does that.
    Source       Zbontar et al. 2021, Section 2.2 "Architecture".
    """

    def __init__(self, backbone, dim=2048, proj_layers=3):
        super().__init__()
        self.backbone = backbone
        c, hidden = backbone.dim, []
        for _ in range(proj_layers - 1):
            hidden += [nn.Linear(c, dim, bias=False), nn.BatchNorm1d(dim), nn.ReLU(inplace=True)]
            c = dim
        self.projector = nn.Sequential(*hidden, nn.Linear(c, dim, bias=False))

    def forward(self, x):
        return self.projector(self.backbone(x))   # (N, d)


def build_model(args):
    # Every residual branch starts at zero: each block begins as its shortcut (the authors' code).
    backbone = harness.initialised(common.ResNet18(stem=args.stem, width=args.width, zero_init_residual=True), args)
    return BarlowTwins(backbone, args.dim, args.proj_layers)


# ------------------------------------------------------------------------------------------------
# Loss
# ------------------------------------------------------------------------------------------------


def cross_correlation(z1, z2):
    """C, the correlations over the batch between all channels of z1 and all of z2.

    z1, z2   (N, d) float, of any scale; row i of both comes from image i, but from different views.
    returns  (d, d) float32 in [-1, 1]; entry (i, j) is that of channel i of z1 and channel j of z2.
    Source   Zbontar et al. 2021, Eq. 2.
    """
    # float32 even inside autocast: the many small products of a column would drown in bf16's 8 bits.
    with torch.autocast(z1.device.type, enabled=False):
        # BatchNorm centres each channel over the batch and gives it unit variance.                 [A1]
        z1, z2 = (F.batch_norm(z.float(), None, None, training=True) for z in (z1, z2))
        # C_ij = sum_b z1_bi z2_bj / ( sqrt(sum_b z1_bi^2) sqrt(sum_b z2_bj^2) ); each root is sqrt(N)  [E2]
        return z1.T @ z2 / len(z1)                              # (d, d)


def barlow_twins_loss(z1, z2, lambda_):
    """How far the cross-correlation is from the identity: the same channel agrees, different ones are unrelated.

    z1, z2   (N, d) float, as for cross_correlation: of the whole batch.  lambda_: >= 0.
    returns  scalar, a sum over all of C; chance (unrelated outputs) is about d.
    Source   Zbontar et al. 2021, Eq. 1.
    """
    c = cross_correlation(z1, z2)
    # L = sum_i (1 - C_ii)^2 + lambda sum_i sum_{j != i} C_ij^2                                      [E1]
    invariance = (1 - c.diagonal()).pow(2).sum()
    redundancy = c.pow(2).sum() - c.diagonal().pow(2).sum()
    return invariance + lambda_ * redundancy


@torch.no_grad()
def agreement(z1, z2):
    """-> the mean of C_ii, 1 where the views agree; and the root mean square of C_ij off the diagonal, 0 without
    redundancy and 1 where all channels are copies of one. (N, d) twice -> two scalars."""
    c = cross_correlation(z1, z2)
    d = len(c)
    return c.diagonal().mean(), ((c.pow(2).sum() - c.diagonal().pow(2).sum()) / (d * (d - 1))).sqrt()


# ------------------------------------------------------------------------------------------------
# Training (Algorithm 1)
# ------------------------------------------------------------------------------------------------


@harness.command
def main(argv=None):
    args = parse_args(argv)
    with harness.open_run(args, RECIPES) as run:
        one = functools.partial(view, args=args, mean=run.dataset.mean, std=run.dataset.std)
        two_crops = common.TwoCrops(functools.partial(one, blur=args.blur1, solarize=0.0),
                                    functools.partial(one, blur=args.blur2, solarize=args.solarize))
        monitor = knn.Monitor(run)

        model = run.place(build_model(args))
        lr = args.step_lr or args.lr * args.batch_size / 256
        optimizer = torch.optim.SGD(model.parameters(), lr, momentum=0.9, weight_decay=args.weight_decay, fused=True)
        schedule = common.LRScheduler(optimizer, lr, run.total_steps, run.warmup_steps)
        network = run.begin(model, optimizer, views=two_crops, sync_bn=True,
                            chance=f"about d = {args.dim} (unrelated outputs)")
        if run.step == 0 and monitor.due:
            run.report(**monitor(model.backbone))                      # the untrained network

        for images, aspect, _ in run.steps():                          # for x in loader             [A1]
            schedule.step(run.position)
            x1, x2 = two_crops(images, aspect, run.random)             # 2 x (N, 3, S, S)            [A1]
            with run.autocast():
                # The views are forwarded one after the other: each has its own BatchNorm statistics.
                z1, z2 = network(x1), network(x2)                      # 2 x (N, d)                  [A1]
            # C is over the batch of all processes, and gradients go back to them.
            z1, z2 = (harness.gather_with_gradient(z.float()) for z in (z1, z2))
            loss = barlow_twins_loss(z1, z2, args.lambd)               #                        [E1] [A1]

            optimizer.zero_grad(set_to_none=True)
            run.scaler.scale(loss).backward()
            run.scaler.step(optimizer)                                 # update                      [A1]
            run.scaler.update()
            same, others = agreement(z1, z2)
            run.record(loss=loss, same=same, others=others)

            if run.epoch_ends:
                row = run.report(**monitor(model.backbone))
                if row["others"] > 0.9:
                    run.say("  collapsing: all channels of z say nearly the same. Raise --lambd.")


if __name__ == "__main__":
    main()
