"""SimSiam: predict one view's representation from the other's, and stop the gradient.

    python simsiam.py --data ./food-11          python simsiam.py          (the drawn toy set, a minute)

Paper       Xinlei Chen and Kaiming He, "Exploring Simple Siamese Representation Learning", CVPR 2021,
            arXiv 2011.10566; code facebookresearch/simsiam
Idea        Two random views of an image go through the same network. A small predictor on one side predicts
            the output of the other side, which is treated as a constant: no negatives, no queue, no second
            network. It takes both, predictor and stop-gradient, to keep the outputs from collapsing to one.
Symbols     x1, x2  views (N, 3, S, S)        f  encoder = backbone + projection MLP
            z  f(x) (N, 2048)                  h  prediction MLP;  p  h(z) (N, 2048)
            D  negative cosine similarity      d  width of z
Map         Eq. 1 -> negative_cosine() [E1] | Eq. 2 -> symmetric_loss() [E2] | Eq. 3 stop-gradient ->
            negative_cosine() [E3] | Eq. 4 -> symmetric_loss() [E4] | Algorithm 1 -> main() [A1]
            Section 3 baseline -> SimSiam [S3] | Section 4.1, std of z -> output_std() [S4.1]
Read on     4.1, 4.2  Without stop-gradient, or without h, ImageNet accuracy is 0.1 %. With h the identity the
                 symmetric loss has the gradient of D(z1, z2), halved: stop-gradient then only halves the step.
            4.4  BatchNorm helps optimisation; "no evidence" that it prevents collapse.
            4.6  One direction alone, D(p1, z2), works too: 64.8 % against 68.1 % after 100 epochs.
            5    A hypothesis: training alternates between f and the mean output of an image over its views;
                 h stands in for that mean. (With a moving average in its place: 55.0 % without h, 5.2.)
Recipe      flag            paper, ImageNet    paper, CIFAR (App. D)  here
            --lr            0.05 x bs/256      0.03 x bs/256          photos 0.5: departure 6, cifar as in the paper
            --image-size    224                32                     photos 128, stl10 96 (one GPU), cifar 32
            --batch-size    512 (Table 4: 256) 512                    photos 256, cifar 512
            --weight-decay  1e-4               5e-4                   as in the paper
            --epochs        100 (to 800)       800                    photos 200, cifar 800
            --proj-layers   3                  2                      as in the paper
            --blur          0.5 (code)         0                      as in the paper
            momentum 0.9, cosine, no warm-up below a batch of 1024 (photos 10 epochs), constant lr of h (Section 4.2)
Published   ImageNet, ResNet-50, linear (Table 4): 68.1 / 70.0 / 70.8 / 71.3 % after 100 / 200 / 400 / 800 epochs.
            CIFAR-10, ResNet-18, linear on the test images: 91.8 % after 800 epochs (Appendix D).
Departures  1. ResNet-18 on images of every size, whose crops are cut from images packed at that size; the paper
               trains ResNet-50 at 224 px, cropping the full image, and ResNet-18 on CIFAR-10 alone. On a GPU the
               network runs in bf16, the authors' in float32. Unless --knn-split is test, a tenth of a training set
               that comes without validation images is held out: CIFAR's epoch is 45,000 images.
            2. The projector's hidden layers are as wide as the backbone's output (512), as in the authors'
               code; the paper's 2048 is the width of ResNet-50. --pred-dim stays 512 whatever --dim is, where
               Appendix B keeps d/4 (and reports failures without a bottleneck): set both.
            3. The cosine falls every step, not every epoch as in the code.
            4. `toy` takes a higher lr, a warm-up and larger crops: see the table below.
            5. BatchNorm sees the batch of all processes, as in the paper, on GPUs only; on CPUs its own share.
            6. `photos` takes ten times the paper's rate and a warm-up, which h skips; --recipe paper neither. (Section
               6.1 has 0.5 too, weight decay 1e-5, for transfer.) A folder of thousands makes few steps: kNN of 4,500
               photos after 20 epochs 32.2 % against 28.2 (two seeds, width 16, 64 px; no GPU has confirmed it).
            7. The output of f has BatchNorm without scale and shift, as in the authors' code. The paper's has both; it
               reports 68.2 % without, 68.1 with them (4.4).
Health      The loss starts near 0 (unrelated unit vectors) and falls towards -0.9, never quite to -1.
            `std` is the standard deviation of z/|z| times sqrt(d): 1 for healthy outputs, 0 once all images
            give the same z. Ablations on `toy`, --amp off, two seeds, kNN untrained 31.2 % (commit 4779e98):
                                 loss      std     kNN
            (none)               -0.78     0.99    74.5 %
            --no-stop-gradient   -0.94     0.32    30.3 %
            --no-predictor       -0.96     0.55    49.3 %
            The paper sees loss -1, std 0 and chance; runs as short as these do not get there, for z's BatchNorm gives
            each channel unit variance over the batch, with scale and shift, as in the paper, or without. Where it is
            left out (one line, commit 470e103), std is 0.09 with either flag after 3 epochs, loss -1.00 and -0.99,
            kNN 28 and 31 %.
"""

import harness  # isort: skip  # before torch: how threads wait, where memory comes from
import functools

import torch
import torch.nn as nn
import torch.nn.functional as F

import augment
import common
import knn

# ------------------------------------------------------------------------------------------------
# Flags
# ------------------------------------------------------------------------------------------------

# The defaults that depend on the data: kind of data -> flag -> value. lr per 256 images.
RECIPES = {
    "toy": dict(image_size=32, stem="cifar", width=16, epochs=6, batch_size=64, lr=0.8, weight_decay=1e-4,
                warmup_epochs=0.6, proj_layers=2, min_crop=0.4, blur=0.0, knn_every=1),
    "cifar": dict(image_size=32, stem="cifar", width=64, epochs=800, batch_size=512, lr=0.03,
                  weight_decay=5e-4, warmup_epochs=0.0, proj_layers=2, min_crop=0.2, blur=0.0, knn_every=5),
    "stl10": dict(image_size=96, stem="imagenet", width=64, epochs=200, batch_size=256, lr=0.05,
                  weight_decay=1e-4, warmup_epochs=0.0, proj_layers=3, min_crop=0.2, blur=0.5, knn_every=5),
    "photos": dict(image_size=128, stem="imagenet", width=64, epochs=200, batch_size=256, lr=0.5,
                   weight_decay=1e-4, warmup_epochs=10.0, proj_layers=3, min_crop=0.2, blur=0.5, knn_every=5),
    "paper": dict(image_size=128, stem="imagenet", width=64, epochs=200, batch_size=256, lr=0.05,
                  weight_decay=1e-4, warmup_epochs=0.0, proj_layers=3, min_crop=0.2, blur=0.5, knn_every=5),
}


def parse_args(argv=None):
    parser = harness.training_parser(__file__, __doc__, RECIPES)
    add = parser.flag
    add("--min-crop", "smallest crop, fraction of the picture's area; too small: two crops share nothing",
        type=harness.number(float, above=0, high=1))
    add("--blur", "chance of a Gaussian blur; not for views of 32 px", type=harness.number(float, low=0, high=1))
    add("--proj-layers", "layers of the projection MLP", type=int, choices=(2, 3))
    add("--dim", "width d of z; narrower saves little and costs accuracy", type=harness.number(int, low=2),
        default=2048)
    add("--pred-dim", "hidden width of the predictor, a bottleneck: the paper keeps it at a quarter of --dim",
        type=harness.number(int, low=1), default=512)
    add("--no-stop-gradient", "ablation: let the gradient into z; collapses", action="store_true")
    add("--no-predictor", "ablation: h = identity; collapses in the paper", action="store_true")
    return harness.parse(parser, argv)


# ------------------------------------------------------------------------------------------------
# Views (Appendix A "Data augmentation": those of MoCo v2)
# ------------------------------------------------------------------------------------------------


def view(images, aspect, generator, args, mean, std):
    """One random view of every image, each with its own draw.

    images   (N, 3, H, H) uint8, as packed.  aspect (N,) original width / height.  generator: common.Draws.
    returns  (N, 3, S, S) float32, normalised, channels_last; S is --view-size, else --image-size.
    """
    x = augment.random_resized_crop(images, args.view_size or args.image_size, scale=(args.min_crop, 1.0), flip=0.5,
                                    aspect=aspect, generator=generator)
    x = augment.color_jitter(x, 0.4, 0.4, 0.4, 0.1, p=0.8, generator=generator, inplace=True)
    x = augment.random_grayscale(x, p=0.2, generator=generator, inplace=True)
    x = augment.gaussian_blur(x, sigma=(0.1, 2.0), p=args.blur, generator=generator, inplace=True)
    return augment.normalize(x, mean, std)


# ------------------------------------------------------------------------------------------------
# Model
# ------------------------------------------------------------------------------------------------


class SimSiam(nn.Module):
    """Encoder f = backbone + projection MLP, and prediction MLP h.                                [S3]

    backbone     maps x to (N, backbone.dim).
    dim          d, the width of z and p.  pred_dim: hidden width of h.  proj_layers: 2 or 3.
    forward(x)   (N, 3, S, S) -> p (N, d), z (N, d).
    Source       Chen & He 2020, Section 3 "Baseline settings".
    """

    def __init__(self, backbone, dim=2048, pred_dim=512, proj_layers=3, predictor=True):
        super().__init__()
        self.backbone = backbone
        c = backbone.dim
        hidden = []
        for _ in range(proj_layers - 1):
            hidden += [nn.Linear(c, c, bias=False), nn.BatchNorm1d(c), nn.ReLU(inplace=True)]
        # BatchNorm on every layer, its output included; there without scale and shift: departure 7.
        output = [nn.Linear(c, dim, bias=False), nn.BatchNorm1d(dim, affine=False)]
        self.projector = nn.Sequential(*hidden, *output)
        self.predictor = nn.Identity()
        if predictor:
            # The output layer has no BatchNorm: with one, training is unstable (Table 3).
            self.predictor = nn.Sequential(
                nn.Linear(dim, pred_dim, bias=False), nn.BatchNorm1d(pred_dim), nn.ReLU(inplace=True),
                nn.Linear(pred_dim, dim),
            )

    def forward(self, x):
        z = self.projector(self.backbone(x))      # (N, d)
        return self.predictor(z), z


def build_model(args):
    # Every residual branch starts at zero: each block begins as its shortcut (Appendix A).
    backbone = harness.initialised(common.ResNet18(stem=args.stem, width=args.width, zero_init_residual=True), args)
    return SimSiam(backbone, args.dim, args.pred_dim, args.proj_layers, predictor=not args.no_predictor)


# ------------------------------------------------------------------------------------------------
# Loss
# ------------------------------------------------------------------------------------------------


def negative_cosine(p, z, stop_gradient=True):
    """D(p, z): minus the cosine between a prediction and the other view's representation.

    p, z           (N, d) float, any length; row i of both comes from image i, but from different views.
    stop_gradient  treat z as a constant, as the paper does; without it the outputs collapse.
    returns        scalar in [-1, 1], the mean over N; unrelated vectors give 0.
    Source         Chen & He 2020, Eq. 1 and 3.
    """
    if stop_gradient:
        z = z.detach()                                                                          # [E3]
    # D(p, z) = - p/|p| . z/|z|                                                                   [E1]
    return -(F.normalize(p.float(), dim=1) * F.normalize(z.float(), dim=1)).sum(dim=1).mean()


def symmetric_loss(p1, z1, p2, z2, stop_gradient=True):
    """Each view predicts the other.

    p1, z1, p2, z2  (N, d) float; row i of all four comes from image i, 1 and 2 are its views.
    returns         scalar in [-1, 1], the mean over N; chance is 0.
    Source          Chen & He 2020, Eq. 4 (Eq. 2 without stop-gradient).
    """
    # L = D(p1, stopgrad(z2)) / 2 + D(p2, stopgrad(z1)) / 2                                  [E2] [E4]
    return 0.5 * negative_cosine(p1, z2, stop_gradient) + 0.5 * negative_cosine(p2, z1, stop_gradient)


@torch.no_grad()
def output_std(z):
    """How far from collapse: std of z/|z| over the batch, mean over channels, times sqrt(d).    [S4.1]

    z        (N, d).
    returns  scalar: 1 for directions spread evenly over the sphere, 0 when all rows are the same.
    Source   Chen & He 2020, Section 4.1 and Fig. 2 (there without the factor: 1/sqrt(d) and 0).
    """
    return F.normalize(z.float(), dim=1).std(dim=0).mean() * z.shape[1] ** 0.5


# ------------------------------------------------------------------------------------------------
# Training (Algorithm 1)
# ------------------------------------------------------------------------------------------------


@harness.command
def main(argv=None):
    args = parse_args(argv)
    with harness.open_run(args, RECIPES) as run:
        two_crops = common.TwoCrops(functools.partial(view, args=args, mean=run.dataset.mean, std=run.dataset.std))
        monitor = knn.Monitor(run)

        model = run.place(build_model(args))
        groups = [{"params": [*model.backbone.parameters(), *model.projector.parameters()]}]
        if not args.no_predictor:
            # h must adapt to the latest z: its rate does not decay (Section 4.2).
            groups.append({"params": model.predictor.parameters(), "fix_lr": True})
        lr = args.step_lr or args.lr * args.batch_size / 256
        # Weight decay on all parameters, BatchNorm's too (Appendix A); BYOL and SimCLR leave those out.
        optimizer = torch.optim.SGD(groups, lr, momentum=0.9, weight_decay=args.weight_decay, fused=True)
        schedule = common.LRScheduler(optimizer, lr, run.total_steps, run.warmup_steps)
        network = run.begin(model, optimizer, views=two_crops, sync_bn=True, chance="0 (unrelated unit vectors)")
        if run.step == 0 and monitor.due:
            run.report(**monitor(model.backbone))                      # the untrained network

        for images, aspect, _ in run.steps():                          # for x in loader             [A1]
            schedule.step(run.position)
            x1, x2 = two_crops(images, aspect, run.random)             # 2 x (N, 3, S, S)            [A1]
            with run.autocast():
                # The views are forwarded one after the other: each has its own BatchNorm statistics.
                p1, z1 = network(x1)                                   # (N, d)                      [A1]
                p2, z2 = network(x2)
            loss = symmetric_loss(p1, z1, p2, z2, stop_gradient=not args.no_stop_gradient)  # [E2] [E4] [A1]

            optimizer.zero_grad(set_to_none=True)
            run.scaler.scale(loss).backward()
            run.scaler.step(optimizer)                                 # update                      [A1]
            run.scaler.update()
            run.record(loss=loss, std=output_std(z1))

            if run.epoch_ends:
                run.report(**monitor(model.backbone))


if __name__ == "__main__":
    main()
