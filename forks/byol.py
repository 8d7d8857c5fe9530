"""BYOL: predict what a slowly moving copy of the network says of the other view.

    python forks/byol.py --data ./food-11       python forks/byol.py       (the drawn toy set)

Paper       Jean-Bastien Grill et al., "Bootstrap Your Own Latent: A New Approach to Self-Supervised Learning",
            NeurIPS 2020, arXiv 2006.07733 (sections as in its v3); code google-deepmind/deepmind-research/byol
Idea        Two random views of an image: the online network predicts from one what the target network gives for
            the other. The target's weights are a moving average of the online network's, and no gradient enters
            them. No negatives and no queue: predictor and moving target keep the outputs from collapsing to one.
Symbols     x1, x2  views (N, 3, S, S), the paper's v, v'     f, g, q  encoder, projector, predictor
            p   q(g(f(x))) (N, d), online                     theta  online weights, xi  those of the target
            z   g'(f'(x)) (N, d), target, no gradient         tau  what the target keeps of itself each step
Map         Eq. 1 -> ema_update() [E1] | Eq. 2 -> byol_loss() [E2] | Algorithm 1 -> main() [A1]
            Section 3.1, target network, both views -> BYOL, main() [S3.1] | Section 3.3, heads, tau -> mlp(),
            target_tau() [S3.3] | Appendix B, views -> view() [B]
Read on     3.2  Why it need not collapse: xi does not follow the gradient of the loss, and near the best
                 predictor the online network gains by keeping what varies.
            5    Accuracy falls less than SimCLR's with small batches (to 256) and with weaker views.
            Tab. 5  ImageNet after 300 epochs, 72.5 %: tau 1, a random target, 18.8; tau 0, a copy of the online
                 network, 0.3; tau 0.999 69.8, 0.9 68.4; without predictor 0.2.
            5    Without a target network a predictor that stays near its best keeps z from collapsing: with a
                 higher rate of its own 66.5 %. SimSiam's paper does without target as well.
Recipe      flag            paper, ImageNet    lightly, CIFAR-10   here
            --lr            LARS, 0.2 x bs/256 SGD 0.12 x bs/256   SGD; cifar as lightly, photos 0.12, untried
            --batch-size    4096               512                 photos 256 (one GPU), cifar 512
            --weight-decay  1.5e-6             5e-4                cifar as lightly, photos 1e-4
            --epochs        1000               800                 photos 200, cifar 800
            warm-up         10 epochs          0                   likewise
            --tau           0.996 (300: 0.99)  0.99, constant      0.99, toy 0.9, rising to 1
            --hidden-dim    4096               1024                likewise; toy 512
            --dim           256                256                 256
            --blur1, 2      1.0, 0.1           0                   likewise
            --solarize      0.2                0                   cifar 0.2, as solo-learn's CIFAR recipe
            --min-crop      0.08               0.08                likewise; momentum 0.9 and cosine everywhere
Published   ImageNet, ResNet-50, linear: 74.3 % after 1000 epochs, 72.5 % after 300.
            CIFAR-10, ResNet-18: kNN (k 200) of the backbone on the test images 87.2 / 91.1 % after 200 / 800
            epochs (lightly's benchmark); linear, trained along, 92.6 % after 1000 (solo-learn, LARS).
Departures  1. ResNet-18, crops cut from packed images, bf16 on a GPU; the paper trains ResNet-50 on crops of 224 px.
            2. SGD with weight decay on all weights; the paper has LARS, which leaves biases and BatchNorm out.
            3. The target's BatchNorm takes the statistics of its batch, as in the authors' code. Theirs starts the
               target from weights of its own, not from a copy; its heads' output layers have no bias.
            4. `toy` takes a higher lr, a faster target, narrower heads, larger crops, no blur, no solarize.
            5. BatchNorm sees the batch of all processes, as in the paper, on GPUs only; on CPUs its own share.
Health      The loss of both views together starts near 4 (unrelated unit vectors); 0 is perfect prediction, and also
            collapse. `std` is the standard deviation of z/|z| times sqrt(d): 1 for directions spread evenly, 0 once
            all images give the same z. z has no BatchNorm, so a healthy run lies below 1.
            `toy`, 6 epochs, seed 0, --amp off: loss 0.17, std 0.79, kNN 74.3 % (72.4 after 3; untrained 27.9).
            A slower target, --tau 0.98 --lr 0.4, has 53.3 % after 5 of 6 epochs: it stays behind in so few steps.
            --no-predictor and --tau 1: not measured.
"""

import copy
import functools
import math
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
    "toy": dict(image_size=32, stem="cifar", width=16, epochs=6, batch_size=64, lr=0.8, weight_decay=1e-4,
                warmup_epochs=0.6, hidden_dim=512, tau=0.9, min_crop=0.4, blur1=0.0, blur2=0.0, solarize=0.0,
                knn_every=1),
    "cifar": dict(image_size=32, stem="cifar", width=64, epochs=800, batch_size=512, lr=0.12, weight_decay=5e-4,
                  warmup_epochs=0.0, hidden_dim=1024, tau=0.99, min_crop=0.08, blur1=0.0, blur2=0.0, solarize=0.2,
                  knn_every=5),
    "stl10": dict(image_size=96, stem="imagenet", width=64, epochs=200, batch_size=256, lr=0.12, weight_decay=1e-4,
                  warmup_epochs=10.0, hidden_dim=4096, tau=0.99, min_crop=0.08, blur1=1.0, blur2=0.1, solarize=0.2,
                  knn_every=5),
    "photos": dict(image_size=128, stem="imagenet", width=64, epochs=200, batch_size=256, lr=0.12, weight_decay=1e-4,
                   warmup_epochs=10.0, hidden_dim=4096, tau=0.99, min_crop=0.08, blur1=1.0, blur2=0.1, solarize=0.2,
                   knn_every=5),
}


def parse_args(argv=None):
    parser = harness.training_parser(__file__, __doc__, RECIPES)
    add = parser.flag
    add("--min-crop", "smallest crop, fraction of the picture's area; too small: two crops share nothing",
        type=harness.number(float, above=0, high=1))
    add("--blur1", "chance of a Gaussian blur, first view; not at 32 px", type=harness.number(float, low=0, high=1))
    add("--blur2", "the same of the second view", type=harness.number(float, low=0, high=1))
    add("--solarize", "chance of inverted bright pixels, second view", type=harness.number(float, low=0, high=1))
    add("--hidden-dim", "hidden width of projector and predictor", type=harness.number(int, low=1))
    add("--dim", "d, width of z and p", type=harness.number(int, low=2), default=256)
    add("--tau", "tau_base, what the target keeps of itself in the first step; climbs to 1 by the last; ablation: "
        "1, the target stays random", type=harness.number(float, low=0, high=1))
    add("--no-predictor", "ablation: q = identity; collapses", action="store_true")
    return harness.parse(parser, argv)


# ------------------------------------------------------------------------------------------------
# Views (Appendix B "Image augmentations", Table 6)
# ------------------------------------------------------------------------------------------------


def view(images, aspect, generator, args, mean, std, blur, solarize):
    """One random view of every image, each with its own draw.                                      [B]

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


def mlp(c, hidden_dim, dim):
    """Projector g and predictor q alike: (N, c) -> (N, dim); the output has no BatchNorm.          [S3.3]"""
    return nn.Sequential(nn.Linear(c, hidden_dim), nn.BatchNorm1d(hidden_dim), nn.ReLU(inplace=True),
                         nn.Linear(hidden_dim, dim))


class BYOL(nn.Module):
    """Online network: encoder f, projector g, predictor q; and the target network, f and g of its own.    [S3.1]

    backbone     f, maps x to (N, backbone.dim).
    dim          d, the width of z and p.  hidden_dim: hidden width of g and q.
    forward(x)   (N, 3, S, S) -> p = q(g(f(x))) of the online network, z' = g'(f'(x)) of the target, without
                 gradient; (N, d) both.
    Source       Grill et al. 2020, Section 3.1 and 3.3 "Architecture".
    """

    def __init__(self, backbone, dim=256, hidden_dim=4096, predictor=True):
        super().__init__()
        self.backbone = backbone
        self.projector = mlp(backbone.dim, hidden_dim, dim)
        self.predictor = mlp(dim, hidden_dim, dim) if predictor else nn.Identity()
        # The target starts as a copy and never sees a gradient. Its BatchNorm buffers remain its own.
        self.target = copy.deepcopy(nn.Sequential(self.backbone, self.projector)).requires_grad_(False)

    def online_parameters(self):
        """Those that the target follows, in the order of target.parameters()."""
        return [*self.backbone.parameters(), *self.projector.parameters()]

    def forward(self, x):
        p = self.predictor(self.projector(self.backbone(x)))            # (N, d)
        with torch.no_grad():
            z = self.target(x)                                          # (N, d)
        return p, z


def build_model(args):
    # Every residual branch starts at zero: each block begins as its shortcut (the authors' code).
    backbone = harness.initialised(common.ResNet18(stem=args.stem, width=args.width, zero_init_residual=True), args)
    return BYOL(backbone, args.dim, args.hidden_dim, predictor=not args.no_predictor)


def target_tau(tau_base, step, total_steps):
    """tau of this step, of steps 0 ... total_steps: from tau_base, by a cosine, to 1.  Source: Section 3.3."""
    # tau = 1 - (1 - tau_base) (cos(pi k / K) + 1) / 2                                               [S3.3]
    return 1 - (1 - tau_base) * (math.cos(math.pi * step / total_steps) + 1) / 2


@torch.no_grad()
def ema_update(target_parameters, online_parameters, tau):
    """Move the target a little towards the online network, in place; parameters only, no buffers.

    target_parameters, online_parameters   iterables of tensors of the same shapes, in the same order.
    tau       in [0, 1]: 1 leaves the target as it is, 0 makes it equal to the online network.
    Source    Grill et al. 2020, Eq. 1.
    """
    # xi <- tau xi + (1 - tau) theta = xi + (1 - tau) (theta - xi)                                    [E1]
    torch._foreach_lerp_(list(target_parameters), list(online_parameters), 1 - tau)


# ------------------------------------------------------------------------------------------------
# Loss
# ------------------------------------------------------------------------------------------------


def byol_loss(p, z):
    """Squared distance of a prediction from the target's output of the other view, both scaled to unit length.

    p, z     (N, d) float, any length; row i of both comes from image i, but from different views. No gradient
             goes into z.
    returns  scalar in [0, 4], the mean over N; unrelated vectors give 2.
    Source   Grill et al. 2020, Eq. 2.
    """
    # L = | p/|p| - z/|z| |^2 = 2 - 2 p/|p| . z/|z|                                                   [E2]
    return (2 - 2 * (F.normalize(p.float(), dim=1) * F.normalize(z.detach().float(), dim=1)).sum(dim=1)).mean()


@torch.no_grad()
def output_std(z):
    """How far from collapse: std of z/|z| over the batch, mean over channels, times sqrt(d).

    z        (N, d).
    returns  scalar: 1 for directions spread evenly over the sphere, 0 when all rows are the same.
    """
    return F.normalize(z.float(), dim=1).std(dim=0).mean() * z.shape[1] ** 0.5


# ------------------------------------------------------------------------------------------------
# Training (Algorithm 1, Appendix A)
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
        learned = [*model.online_parameters(), *model.predictor.parameters()]
        optimizer = torch.optim.SGD(learned, lr, momentum=0.9, weight_decay=args.weight_decay, fused=True)
        schedule = common.LRScheduler(optimizer, lr, run.total_steps, run.warmup_steps)
        network = run.begin(model, optimizer, views=two_crops, sync_bn=True, chance="4 (unrelated unit vectors)")
        if run.step == 0 and monitor.due:
            run.report(**monitor(model.backbone))                      # the untrained network

        for images, aspect, _ in run.steps():                          # for x in loader             [A1]
            schedule.step(run.position)
            x1, x2 = two_crops(images, aspect, run.random)             # 2 x (N, 3, S, S)            [A1]
            with run.autocast():
                # The views are forwarded one after the other: each has its own BatchNorm statistics.
                p1, z1 = network(x1)                                   # (N, d)                      [A1]
                p2, z2 = network(x2)
            # Each view predicts the other, and both losses are added.                               [S3.1]
            loss = byol_loss(p1, z2) + byol_loss(p2, z1)               #                        [E2] [A1]

            optimizer.zero_grad(set_to_none=True)
            run.scaler.scale(loss).backward()
            run.scaler.step(optimizer)                                 # update of theta             [A1]
            run.scaler.update()
            # Then the target follows what the online network has become.                       [E1] [A1]
            tau = target_tau(args.tau, run.position, run.total_steps)
            ema_update(model.target.parameters(), model.online_parameters(), tau)
            run.record(loss=loss, std=output_std(z1))

            if run.epoch_ends:
                row = run.report(**monitor(model.backbone))
                if row["std"] < 0.1:
                    run.say("  collapsing: all images give nearly the same output. Keep the predictor; lower --lr\n"
                            f"  (the rate per step is {lr:.3g}) or raise --tau.")


if __name__ == "__main__":
    main()
