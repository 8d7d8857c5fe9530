"""RotNet: rotate an image by 0, 90, 180 or 270 degrees, and predict by how much.

    python rotnet.py --data ./food-11          python rotnet.py          (the drawn toy set)

Paper       Spyros Gidaris, Praveer Singh and Nikos Komodakis, "Unsupervised Representation Learning by
            Predicting Image Rotations", ICLR 2018, arXiv 1803.07728; code gidariss/FeatureLearningRotNet
Idea        Whoever can tell how an image was rotated must know what stands upright in it: the objects and
            their parts. So a plain classifier of four rotations learns features without a label.
Symbols     x   upright views (N, 3, S, S)     y   class 0..3 (the paper's 1..4, minus one): by 90 y degrees; K = 4
            x4  all rotations (4N, 3, S, S)    y4  their classes (4N,)
            g(x | y)  x rotated counter-clockwise by y quarter turns;   F  backbone + linear head
Map         Section 3.2, g(x | y) -> rotation_batch() [S3.2] | Eq. 1 -> main(), the logits of F [E1]
            Eq. 2 -> main(), the mean over images [E2] | Eq. 3 -> focal_loss() [E3]
            Section 4.1, schedule and all four rotations in a batch -> main() [S4.1]
Read on     3.2      Why rotations: quarter turns move pixels and interpolate none, so nothing but the content
                     gives them away; and the task is well posed, since photographs have an upright.
            Table 1  The second of four blocks has the best features; the last is the most specific to rotations.
            Table 2  Four rotations beat two and eight: the paper's ablation. (--one-rotation is Section 4.1's.)
Recipe      flag            paper, CIFAR       authors' ImageNet      here
            --lr            0.1 at batch 128   0.01 at batch 192      0.2 per 256 images: CIFAR's; photos 0.4
            --batch-size    128 (512 inputs)   192                    128, photos 32: departure 3
            --weight-decay  5e-4               5e-4                   5e-4
            --epochs        100 (code: 200)    50 (paper: 30)         cifar 200, photos 100
            --schedule      / 5 after 30, 60,  / 10 after 30, 60,     steps: as CIFAR
                            80 % of the run    90 % of the run        photos cosine, 10 epochs of warm-up
            --crop          pad (code)         resized (code)         cifar pad, photos resized
            momentum 0.9; from the authors' code: Nesterov, random flips before the rotation, padding of 4
Published   None for ResNet-18. CIFAR-10, Network-in-Network of 4 blocks, a non-linear classifier on the whole
            maps of block 1 / 2 / 3 / 4 (Table 1): 85.07 / 89.06 / 86.21 / 61.73 %. A user's rerun of the authors'
            code (its issue 6): 84.65 / 88.89 / 85.88 / 54.04 %, and 93.65 % of rotations right.
Departures  1. A ResNet-18 with one linear head; the paper trains Network-in-Network and AlexNet, in float32; on a
               GPU we take bf16. Photos are 128 px, crops cut from images packed at that size; theirs 224 px, cut
               from the full image. Unless --knn-split is test, a tenth of a training set that comes without
               validation images is held out. With several processes on CPUs BatchNorm sees each one's share.
            2. `toy` takes smaller batches, a cosine and a warm-up: see the table below.
            3. `photos` takes small batches, 0.05 a step (the authors' ImageNet run 0.01 at 192), a cosine, and crops
               of at least 0.5 of the area (theirs 0.08; smaller ones lose what shows which way is up): kNN of 4,500
               photos after 10 epochs 35.5 %; with CIFAR's batch, rate and schedule and crops from 0.2, which are
               --recipe paper, 30.5 after 20 (two seeds, width 16, 64 px; no GPU has confirmed it).
            4. `stl10` and --recipe paper take CIFAR's rate and schedule, and crops from 0.2, our own choice; the
               authors' run on photographs is the middle column, with crops from 0.08.
            5. The focal loss is no part of the paper (Lin et al. 2017, arXiv 1708.02002, Eq. 5 [F5]): an
               option for data where most images are easy.
Health      The loss starts at log 4 = 1.386 and falls, `val_loss` with it. `rotation` (training views) and
            `val_rotation` (evaluation views; with --knn-split test `test_rotation`) are rotation accuracies in
            percent; chance is 25 %. Not every image has an upright: a disc looks the same from all sides. The
            last layers specialise in rotations, hence kNN of layer2, layer3 and layer4 (pooled; the paper's
            classifiers see whole maps). An ablation of ours, on `toy`, --amp off, two seeds (commit 4779e98):
            --flip-after-rotation    val_rotation 54.3 % instead of 59.5, kNN 81.8 instead of 80.5 %: an image
                                     rotated by 90 degrees and then mirrored is its mirror image rotated by 270.
                                     Where both are equally likely the two classes merge, and 75 % is the limit;
                                     letters, or glyphs such as the toy's L, still tell them apart. (Half of the
                                     glyphs look the same when rotated: 60 % is already a lot.)
"""

import harness  # isort: skip  # before torch: how threads wait, where memory comes from
import functools
import math

import torch
import torch.nn as nn
import torch.nn.functional as F

import augment
import common
import knn
import pictures

# ------------------------------------------------------------------------------------------------
# Flags
# ------------------------------------------------------------------------------------------------

# The defaults that depend on the data: kind of data -> flag -> value. lr per 256 images (not inputs).
RECIPES = {
    "toy": dict(image_size=32, stem="cifar", width=16, epochs=3, batch_size=32, lr=0.8, weight_decay=5e-4,
                warmup_epochs=0.3, schedule="cosine", crop="pad", min_crop=0.4, knn_every=1),
    "cifar": dict(image_size=32, stem="cifar", width=64, epochs=200, batch_size=128, lr=0.2,
                  weight_decay=5e-4, warmup_epochs=0.0, schedule="steps", crop="pad", min_crop=0.2, knn_every=5),
    "stl10": dict(image_size=96, stem="imagenet", width=64, epochs=100, batch_size=128, lr=0.2,
                  weight_decay=5e-4, warmup_epochs=0.0, schedule="steps", crop="resized", min_crop=0.2, knn_every=5),
    "photos": dict(image_size=128, stem="imagenet", width=64, epochs=100, batch_size=32, lr=0.4,
                   weight_decay=5e-4, warmup_epochs=10.0, schedule="cosine", crop="resized", min_crop=0.5, knn_every=5),
    "paper": dict(image_size=128, stem="imagenet", width=64, epochs=100, batch_size=128, lr=0.2,
                  weight_decay=5e-4, warmup_epochs=0.0, schedule="steps", crop="resized", min_crop=0.2, knn_every=5),
}


def parse_args(argv=None):
    parser = harness.training_parser(__file__, __doc__, RECIPES)
    add = parser.flag
    add("--schedule", "of the learning rate after warm-up; steps: a fifth at 30, 60 and 80 %% of the run",
        choices=("steps", "cosine"))
    add("--crop", "pad: shift by up to an eighth of the side (4 px at 32), black edges; resized: a random "
        "part, enlarged", choices=("pad", "resized"))
    add("--min-crop", "of --crop resized: smallest crop, fraction of the picture's area; too small: nothing "
        "in it shows which way is up", type=harness.number(float, above=0, high=1))
    add("--one-rotation", "turn each image once, at random, instead of in all four ways: a quarter of the "
        "work and of the signal", action="store_true")
    add("--focal-gamma", "of the focal loss: how much less an easy input counts; 0: plain cross-entropy",
        type=harness.number(float, low=0), default=0.0)
    add("--focal-alpha", "of the focal loss: a factor of the whole loss", type=harness.number(float, above=0),
        default=1.0)
    add("--stop-at-accuracy", "end after the epoch whose validation rotation accuracy reaches this",
        metavar="PERCENT", type=harness.number(float, above=0, high=100), default=None)
    add("--flip-after-rotation", "ablation: mirror after the rotation, not before; 90 and 270 degrees merge",
        action="store_true")
    args = harness.parse(parser, argv)
    harness.check_stop(args.stop_at_accuracy, chance=25)
    if args.stop_at_accuracy and args.knn_split == "test":
        parser.error("--stop-at-accuracy: the test split must not choose when to stop; leave --knn-split out")
    return args


# ------------------------------------------------------------------------------------------------
# Views (the authors' code: pad and crop, flip; everything that is random happens before the rotation)
# ------------------------------------------------------------------------------------------------


def view(images, aspect, generator, args, mean, std):
    """One random upright view of every image, each with its own draw.

    images   (N, 3, H, H) uint8, as packed.  aspect (N,) original width / height.  generator: common.Draws.
    returns  (N, 3, S, S) float32, normalised, channels_last; S is --view-size, else --image-size.
    """
    size = args.view_size or args.image_size
    flip = 0.0 if args.flip_after_rotation else 0.5
    if args.crop == "resized":
        x = augment.random_resized_crop(images, size, scale=(args.min_crop, 1.0), flip=flip, aspect=aspect,
                                        generator=generator)
    else:
        x = augment.center_crop(images, size, aspect)
        x = augment.random_crop(x, padding=size // 8, generator=generator)
        x = augment.random_horizontal_flip(x, flip, generator=generator, inplace=True)
    return augment.normalize(x, mean, std)


def rotation_batch(x):
    """All four rotations of every image, and which is which.                                    [S3.2]

    x        (N, 3, S, S), square.
    returns  x4 (4N, 3, S, S), channels_last: row k*N + i is image i rotated counter-clockwise by k quarter
             turns, pixels moved, none changed; y4 (4N,) int64, the k of each row.
    raises   ValueError for images that are not square.
    Source   Gidaris et al. 2018, Section 3.2; their code rotates by transposing and flipping: the same.
    """
    if x.shape[2] != x.shape[3]:
        raise ValueError(f"images must be square, got {x.shape[2]}x{x.shape[3]} (height x width)")
    # Dimensions 2 and 3 are height and width; from 2 to 3 the right edge goes to the top: counter-clockwise.
    x4 = torch.cat([x.rot90(k, (2, 3)) for k in range(4)])                     # (4N, 3, S, S)
    y4 = torch.arange(4, device=x.device).repeat_interleave(len(x))            # (4N,)
    return x4.contiguous(memory_format=torch.channels_last), y4


def turn(x, generator, args):
    """The inputs of a step: rotation_batch(x), or one random rotation per image, or the ablation.

    returns  inputs (4N, 3, S, S) and classes (4N,); N of both with --one-rotation.
    """
    if args.one_rotation:
        y = (4 * augment.uniforms(generator, len(x))[:, 0]).long()                              # (N,)
        x4, y4 = augment.rotate(x, y), augment.send(y, x.device)
    else:
        x4, y4 = rotation_batch(x)                                             # (4N, 3, S, S), (4N,)
    if args.flip_after_rotation:
        # An image rotated by 90 degrees, then mirrored, is the mirrored image rotated by 270: the same
        # input now has both labels. Before the rotation a mirrored image is just another image.
        x4 = augment.random_horizontal_flip(x4, generator=generator)
    return x4.contiguous(memory_format=torch.channels_last), y4


# ------------------------------------------------------------------------------------------------
# Model
# ------------------------------------------------------------------------------------------------


class RotNet(nn.Module):
    """F: a backbone and one linear layer that predicts the rotation.

    backbone     maps x to (N, backbone.dim).
    forward(x)   (N, 3, S, S) -> logits (N, 4); their softmax is F^y(x), the probability of rotation y.
    Source       Gidaris et al. 2018, Section 3.1.
    """

    def __init__(self, backbone):
        super().__init__()
        self.backbone = backbone
        self.head = nn.Linear(backbone.dim, 4)

    def forward(self, x):
        return self.head(self.backbone(x))                                     # (N, 4)


def build_model(args):
    return RotNet(harness.initialised(common.ResNet18(stem=args.stem, width=args.width), args))


# ------------------------------------------------------------------------------------------------
# Loss
# ------------------------------------------------------------------------------------------------


def focal_loss(logits, y, gamma=0.0, alpha=1.0):
    """Cross-entropy over the rotations, or with gamma > 0 the focal loss.

    logits   (M, K) float, the outputs of F before softmax.  y (M,) int64 in 0..K-1, the true rotations (K = 4),
             or the classes of linear.py.
    gamma    0: the paper's cross-entropy (times alpha). Above: inputs already known count less.
    alpha    a factor; the same for all rotations, as none is rarer than another.
    returns  float32 scalar, the mean over M; chance (zero logits) is alpha * (1 - 1/K)^gamma * log K.
    Source   Gidaris et al. 2018, Eq. 3; Lin et al. 2017, Eq. 5.
    """
    # p_t is the probability of the true rotation: F^y(g(x | y)).
    log_p = F.log_softmax(logits.float(), dim=1).gather(1, y[:, None]).squeeze(1)          # (M,)   [E3]
    if gamma == 0:
        # loss(X) = - 1/K sum_y log F^y( g(X | y) )                                               [E3]
        return -alpha * log_p.mean()
    # FL = - alpha (1 - p_t)^gamma log p_t                                                        [F5]
    # expm1 keeps 1 - p_t exact near 0, the clamp keeps its power differentiable at 0.
    wrong = (-torch.expm1(log_p)).clamp(min=1e-12)
    return -(alpha * wrong**gamma * log_p).mean()


@torch.no_grad()
def rotation_scores(model, split, dataset, autocast, gamma=0.0, alpha=1.0, batch_size=125):
    """Loss and rotation accuracy: every image of a split, evaluation view, eval mode, all four rotations.

    split    pictures.Split; its labels are not needed. The model is left in the mode it came in.
    gamma, alpha  of focal_loss().
    returns  the mean loss, and 100 * correct / (4 * images), floats; chance is 25.
    """
    was_training, device = model.training, next(model.parameters()).device
    model.eval()
    losses, right, total = common.AverageMeter(), 0, 0
    loader = pictures.Batches(split, batch_size, device, shuffle=False, drop_last=False)
    for images, aspect, _, _ in loader.batches(0):
        x = knn.evaluation_view(images, aspect, dataset.size, dataset.mean, dataset.std)
        x4, y4 = rotation_batch(x)                                             # (4n, 3, S, S), (4n,)
        with autocast():
            logits = model.forward(x4)           # (4n, 4); --compile is for training, not for batches of this size
        losses.update(focal_loss(logits, y4, gamma, alpha), len(y4))
        # Counts, not a mean of batch means: the last batch may be short.
        right, total = right + (logits.argmax(dim=1) == y4).sum(), total + len(y4)
    model.train(was_training)
    return losses.avg, 100.0 * int(right) / total


def held_out_scores(run, model):
    """{"val_loss": ..., "val_rotation": percent}, or those of the test split; empty where it has no images."""
    args, split = run.args, getattr(run.dataset, run.args.knn_split)
    if split is None or not harness.is_main():
        return {}
    loss, right = rotation_scores(model, split, run.dataset, run.autocast, args.focal_gamma, args.focal_alpha)
    return {f"{args.knn_split}_loss": loss, f"{args.knn_split}_rotation": right}


# ------------------------------------------------------------------------------------------------
# Training (Section 4.1)
# ------------------------------------------------------------------------------------------------


@harness.command
def main(argv=None):
    args = parse_args(argv)
    with harness.open_run(args, RECIPES) as run:
        one_crop = functools.partial(view, args=args, mean=run.dataset.mean, std=run.dataset.std)
        monitor = knn.Monitor(run, layers=("layer2", "layer3", "layer4"))
        if args.stop_at_accuracy and run.dataset.val is None:
            raise common.UsageError("--stop-at-accuracy: this data has no validation images; leave it out")

        model = run.place(build_model(args))
        lr = args.step_lr or args.lr * args.batch_size / 256  # of images: their four copies do not raise it
        optimizer = torch.optim.SGD(model.parameters(), lr, momentum=0.9, weight_decay=args.weight_decay,
                                    nesterov=True, fused=True)
        # Epochs 30, 60 and 80 of 100 (the code: 60, 120, 160 of 200), the same shares of any run.  [S4.1]
        milestones = [round(share * run.total_steps) for share in (0.3, 0.6, 0.8)]
        schedule = common.LRScheduler(optimizer, lr, run.total_steps, run.warmup_steps,
                                      kind=args.schedule, milestones=milestones, factor=0.2)
        chance = args.focal_alpha * 0.75**args.focal_gamma * math.log(4)
        formula = "log(4)" if (args.focal_gamma, args.focal_alpha) == (0, 1) else "alpha (3/4)^gamma log(4)"
        network = run.begin(model, optimizer, views=lambda *batch: turn(one_crop(*batch), batch[-1], args)[0],
                            sync_bn=True, chance=f"{formula} = {chance:.4g} (25 % of rotations right)")
        if run.step == 0 and monitor.due:
            run.report(**held_out_scores(run, model), **monitor(model.backbone))  # the untrained network

        for images, aspect, _ in run.steps():
            schedule.step(run.position)
            x = one_crop(images, aspect, run.random)                   # (N, 3, S, S)
            # All four rotations of an image in one batch: better than one at random, the paper says. [S4.1]
            x4, y4 = turn(x, run.random, args)                         # (4N, 3, S, S), (4N,)
            with run.autocast():
                logits = network(x4)                                   # (4N, 4)                   [E1]
            # min over theta of 1/N sum_i loss(X_i): every image and every rotation weighs the same. [E2]
            loss = focal_loss(logits, y4, args.focal_gamma, args.focal_alpha)

            optimizer.zero_grad(set_to_none=True)
            run.scaler.scale(loss).backward()
            run.scaler.step(optimizer)
            run.scaler.update()
            run.record(loss=loss, rotation=100.0 * (logits.argmax(dim=1) == y4).float().mean())

            if run.epoch_ends:
                held_out = held_out_scores(run, model) if monitor.due or args.stop_at_accuracy else {}
                stop = harness.stop_reason(args.stop_at_accuracy, held_out.get("val_rotation", 0), "rotations")
                run.report(stop, **held_out, **monitor(model.backbone, now=stop))


if __name__ == "__main__":
    main()
