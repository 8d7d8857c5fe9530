"""MoCo: find the other view of an image among thousands of keys from a slowly moving encoder.

    python moco.py --data ./food-11             python moco.py             (the drawn toy set)

Paper       Kaiming He et al., "Momentum Contrast for Unsupervised Visual Representation Learning", CVPR 2020,
            arXiv 1911.05722 (v1); Xinlei Chen et al., "Improved Baselines with Momentum Contrastive
            Learning", arXiv 2003.04297 (v2, the default here); code facebookresearch/moco
Idea        One view of an image is the query, the other its key, the positive. The query must be closer to it
            than to the keys of earlier batches, which wait in a queue: the dictionary is large, whatever the
            batch size. It is consistent because the key encoder is a moving average of the query encoder.
Symbols     x1, x2  views (N, 3, S, S)        f_q, f_k  query and key encoder = backbone + projection head
            q  f_q(x1) (N, C) unit rows        k  f_k(x2) (N, C) unit rows, no gradient
            queue  (K, C) unit rows            T  temperature        m  momentum of the key encoder
Map         Eq. 1 -> info_nce() [E1] | Eq. 2 -> ema_update() [E2] | Algorithm 1 -> main() [A1]
            Section 3.2, the queue -> MoCo.enqueue() [S3.2] | Section 3.3, shuffling BN -> SplitBatchNorm,
            MoCo.forward() [S3.3] | v2, the MLP head -> MoCo [V2]
Read on     3.2        End-to-end training has no large dictionary, a memory bank no consistent one (Fig. 2).
            4.1        m from 0.99 to 0.9999 works, 0.9 is considerably worse, 0 does not converge.
            A.9        BatchNorm leaks: pretext accuracy soon passes 99.9 % while kNN falls (Fig. A.1).
            v2, Tab. 1 MLP head with T 0.2: 5.6 points more (at T 0.07 2.3); blur 2.8, both 6.7; all and cosine 6.9.
Recipe      flag                paper v1 / v2, ImageNet  authors' CIFAR notebook   here
            --lr                0.03 x bs/256            0.03 x bs/256             photos, cifar: the same
            --image-size        224                      32                        photos 128, stl10 96, cifar 32
            --batch-size        256                      512                       photos 256, cifar 512
            --weight-decay      1e-4                     5e-4                      photos 1e-4, cifar 5e-4
            --epochs            200                      200                       200
            --queue-size        65536                    4096                      photos at most 4096: departure 3
            --momentum-encoder  0.999                    0.99                      photos 0.99: departure 3
            --temperature       0.07 / 0.2               0.1                       photos as v2, cifar 0.1
            --head              linear / mlp             linear                    photos mlp, cifar linear
            --min-crop          0.2                      0.08                      photos 0.2, cifar 0.08
            --blur              0 / 0.5                  0                         photos 0.5, cifar 0
            --bn-splits         8 GPUs, of 32 images     8, of 64                  8; small batches fewer
            momentum 0.9, no warm-up, 128-d keys; v1 steps, v2 and notebook cosine; --v1 takes v1's
Published   ImageNet, ResNet-50, linear, 200 epochs: v1 60.6 %, v2 67.5 % (71.1 % after 800).
            CIFAR-10, ResNet-18 (the notebook), kNN with k 200 of the 128-d output on the test images, after
            200 / 400 / 800 epochs: 82.6 / 86.3 / 88.7 %, with --symmetric 85.3 / 88.5 / 89.7 % (linear 90.7).
            To compare: --data cifar10 --knn-split test (no training images held out), then knn.py
            --projector; `knn` here is that of the backbone.
Departures  1. ResNet-18 at 128 px (stl10 96), whose crops are cut from images packed at that size; the papers
               train ResNet-50 at 224 px and crop the full image. The notebook: ResNet-18, 32 px, as here,
               but for its first layer's weights, PyTorch's default. All in float32; here a GPU takes bf16.
            2. The cosine falls every step; in the code every epoch (the notebook's is 0 in the last).
            3. A folder has thousands of photos, not a million. The longer the queue, the more often it holds an
               old key of the query's own image; and with 10,000 images m = 0.999 averages over 25 epochs. So K
               is at most a quarter of the images, then a power of two (a batch at least): kNN of 4,500 photos
               after 20 epochs 35.1 % against 31.4 with 4096 keys and groups of 16 (two seeds, width 16, 64 px).
               --recipe paper takes the paper's K and m.
            4. --bn-splits groups of a batch stand for eight GPUs, as in the notebook; several processes share them.
            5. Algorithm 1 updates f_k after the SGD step; here, as in the authors' code, before the next keys are
               made. The keys are the same: the one extra update is the first, between equal weights.
            6. `toy` takes a higher lr, a warm-up and larger crops: see the table below.
Health      The loss starts low (the queue is noise), climbs towards log(1 + K) as real keys fill it, then
            falls. `accuracy` is the share of queries whose own key scores highest, 1/(1 + K) by chance, 0 once
            all keys are the same. On `toy`, --bn-splits 8 --amp off: 0.04, kNN 70.0 % (two seeds, commit 4779e98);
            --no-shuffle-bn        0.12: BatchNorm gives keys away; kNN 79.7 %, not lower in a run so short.
            --momentum-encoder 0   0, kNN 31.2 % (one seed), loss at chance, log(257) = 5.549: the keys disagree.
"""

import harness  # isort: skip  # before torch: how threads wait, where memory comes from
import copy
import functools
import math

import torch
import torch.nn as nn
import torch.nn.functional as F

import augment
import common
import knn
from harness import distributed

# ------------------------------------------------------------------------------------------------
# Flags
# ------------------------------------------------------------------------------------------------

# The defaults that depend on the data: kind of data -> flag -> value. lr per 256 images.
RECIPES = {
    "toy": dict(image_size=32, stem="cifar", width=16, epochs=7, batch_size=64, lr=0.4, weight_decay=1e-4,
                warmup_epochs=0.7, queue_size=256, momentum_encoder=0.99, temperature=0.2, head="mlp",
                min_crop=0.4, blur=0.0, knn_every=1),
    "cifar": dict(image_size=32, stem="cifar", width=64, epochs=200, batch_size=512, lr=0.03,
                  weight_decay=5e-4, warmup_epochs=0.0, queue_size=4096, momentum_encoder=0.99,
                  temperature=0.1, head="linear", min_crop=0.08, blur=0.0, knn_every=5),
    "stl10": dict(image_size=96, stem="imagenet", width=64, epochs=200, batch_size=256, lr=0.03,
                  weight_decay=1e-4, warmup_epochs=0.0, queue_size=65536, momentum_encoder=0.999,
                  temperature=0.2, head="mlp", min_crop=0.2, blur=0.5, knn_every=5),
    "photos": dict(image_size=128, stem="imagenet", width=64, epochs=200, batch_size=256, lr=0.03,
                   weight_decay=1e-4, warmup_epochs=0.0, queue_size=4096, momentum_encoder=0.99,
                   temperature=0.2, head="mlp", min_crop=0.2, blur=0.5, knn_every=5),
    "paper": dict(image_size=128, stem="imagenet", width=64, epochs=200, batch_size=256, lr=0.03,
                  weight_decay=1e-4, warmup_epochs=0.0, queue_size=65536, momentum_encoder=0.999,
                  temperature=0.2, head="mlp", min_crop=0.2, blur=0.5, knn_every=5),
}
# What --v1 takes instead, whatever the data.
V1 = dict(temperature=0.07, head="linear", blur=0.0)


def parse_args(argv=None):
    parser = harness.training_parser(__file__, __doc__, RECIPES)
    add = parser.flag
    add("--min-crop", "smallest crop, fraction of the picture's area; too small: two crops share nothing",
        type=harness.number(float, above=0, high=1))
    add("--blur", "chance of a Gaussian blur; not at 32 px", type=harness.number(float, low=0, high=1))
    add("--queue-size", "K, keys of earlier batches that serve as negatives; more than the training images: "
        "stale keys of the query's own picture are among them", type=harness.number(int, low=1))
    add("--momentum-encoder", "m, what the key encoder keeps of itself each step; ablation: 0, it is the "
        "query encoder; too low: the queue's keys disagree, too high: it learns too late",
        type=harness.number(float, low=0, high=1))
    add("--temperature", "T of the softmax; too low: only the hardest negatives count",
        type=harness.number(float, above=0))
    add("--head", "projection head: one linear layer (v1) or two (v2)", choices=("linear", "mlp"))
    add("--dim", "C, width of queries and keys", type=harness.number(int, low=2), default=128)
    add("--bn-splits", "groups of a batch, each with its own BatchNorm statistics as on a GPU of its own "
        "(default: 8, or as many as leave 32 images in each, but 2 at least)", type=harness.number(int, low=1),
        default=None)
    add("--symmetric", "both views are queries, twice the work per step", action="store_true")
    add("--v1", "the first paper: linear head, T 0.07, its views, lr / 10 at 60 and 80 %% of the run",
        action="store_true")
    add("--no-shuffle-bn", "ablation: query and key share a BatchNorm group, which gives the answer away",
        action="store_true")
    args = harness.parse(parser, argv)
    if args.v1:
        harness.fill_flags(args, V1)
    return args


def bn_groups(splits, batch_size):
    """Into how many groups BatchNorm splits a batch; None: of 32 images, 8 at most, 2 at least if they have 4 each.

    raises  UsageError for groups of fewer than 2 images: they would be normalised by themselves.
    """
    if splits is None:
        return max(1, min(2, batch_size // 4), min(8, batch_size // 32))  # 256 on 8 GPUs make groups of 32
    if splits > 1 and batch_size < 2 * splits:
        raise common.UsageError(f"--bn-splits {splits}: groups of fewer than 2 images at --batch-size "
                                f"{batch_size}; take at most {batch_size // 2}")
    return splits


# ------------------------------------------------------------------------------------------------
# Views (v1: Section 3.3 "Technical details"; v2 adds SimCLR's blur; its code jitters less, and before the grey)
# ------------------------------------------------------------------------------------------------


def view(images, aspect, generator, args, mean, std):
    """One random view of every image, each with its own draw.

    images   (N, 3, H, H) uint8, as packed.  aspect (N,) original width / height.  generator: common.Draws.
    returns  (N, 3, S, S) float32, normalised, channels_last; S is --view-size, else --image-size.
    """
    x = augment.random_resized_crop(images, args.view_size or args.image_size, scale=(args.min_crop, 1.0), flip=0.5,
                                    aspect=aspect, generator=generator)
    if args.v1:
        x = augment.random_grayscale(x, p=0.2, generator=generator, inplace=True)
        x = augment.color_jitter(x, 0.4, 0.4, 0.4, 0.4, p=1.0, generator=generator, inplace=True)
    else:
        x = augment.color_jitter(x, 0.4, 0.4, 0.4, 0.1, p=0.8, generator=generator, inplace=True)
        x = augment.random_grayscale(x, p=0.2, generator=generator, inplace=True)
    x = augment.gaussian_blur(x, sigma=(0.1, 2.0), p=args.blur, generator=generator, inplace=True)
    return augment.normalize(x, mean, std)


# ------------------------------------------------------------------------------------------------
# Model
# ------------------------------------------------------------------------------------------------


class SplitBatchNorm(nn.BatchNorm2d):
    """BatchNorm2d that sees a batch as several GPUs would: each group has its own mean and variance.  [S3.3]

    splits   number of groups of consecutive rows; their sizes differ by one at most.
    In eval mode, and in its parameters, buffers and their names, it is a BatchNorm2d.
    raises   ValueError for a training batch of fewer rows than groups.
    """

    def __init__(self, num_features, splits):
        super().__init__(num_features)
        self.splits = splits

    def forward(self, x):
        if not self.training or self.splits == 1:
            return super().forward(x)
        if len(x) < self.splits:
            raise ValueError(f"{len(x)} images cannot be split into {self.splits} BatchNorm groups")
        # Every group moves its own copy of the running statistics; what is kept is the mean of the copies.
        means, variances = (s.repeat(self.splits, 1) for s in (self.running_mean, self.running_var))  # (splits, C)
        if len(x) % self.splits == 0:
            # One call for all groups, which stand side by side as channels: (n, splits * C, H, W).
            weight, bias = (s.repeat(self.splits) for s in (self.weight, self.bias))
            y = F.batch_norm(torch.cat(x.chunk(self.splits), dim=1), means.view(-1), variances.view(-1), weight, bias,
                             True, self.momentum, self.eps)
            y = torch.cat(y.chunk(self.splits, dim=1))
        else:  # of two sizes, as those of x.tensor_split(splits), whose backward is slow
            sizes = [(len(x) + i) // self.splits for i in reversed(range(self.splits))]
            y = torch.cat([F.batch_norm(group, *own, self.weight, self.bias, True, self.momentum, self.eps)
                           for group, *own in zip(x.split(sizes), means, variances, strict=True)])
        self.running_mean.copy_(means.mean(dim=0))
        self.running_var.copy_(variances.mean(dim=0))
        self.num_batches_tracked.add_(1)
        return y


def split_batch_norm(module, splits):
    """Replace every BatchNorm2d inside by a SplitBatchNorm with the same weights and statistics; in place."""
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            setattr(module, name, SplitBatchNorm(child.num_features, splits))
            getattr(module, name).load_state_dict(child.state_dict())
        else:
            split_batch_norm(child, splits)
    return module


class MoCo(nn.Module):
    """Query encoder f_q = backbone + projection head, key encoder f_k of the same shape, and the queue.

    backbone    maps x to (N, backbone.dim); its BatchNorm2d are replaced by SplitBatchNorm.
    dim         C, the width of q and k.  queue_size: K.  head: "mlp" or "linear".  bn_splits: groups.
    forward(x_q, x_k, order)   (N, 3, S, S) twice -> q (N, C), k (N, C), unit rows; k without gradient.
                order (N,) int64 on their device, a permutation: how the key encoder sees the rows of x_k; of P
                processes (P*N,), of all their rows, the same on each. None: unshuffled.
                Row i of q and k comes from image i in either case.
    Source      He et al. 2019, Section 3.2 and 3.3; Chen et al. 2020 for the head.
    """

    def __init__(self, backbone, dim=128, queue_size=65536, head="mlp", bn_splits=8):
        super().__init__()
        self.backbone = split_batch_norm(backbone, bn_splits)
        width = backbone.dim
        hidden = [nn.Linear(width, width), nn.ReLU(inplace=True)] if head == "mlp" else []      # [V2]
        self.projector = nn.Sequential(*hidden, nn.Linear(width, dim))
        # f_k starts as a copy of f_q and never sees a gradient. Its BatchNorm buffers remain its own.
        self.key_encoder = copy.deepcopy(nn.Sequential(self.backbone, self.projector)).requires_grad_(False)
        # Buffers are saved with the weights: a resumed run goes on with the keys it had.
        self.register_buffer("queue", F.normalize(torch.randn(queue_size, dim), dim=1))         # (K, C)
        self.register_buffer("pointer", torch.zeros((), dtype=torch.long))  # the oldest key: replaced next

    def query_parameters(self):
        """Those of f_q, in the order of key_encoder.parameters()."""
        return [*self.backbone.parameters(), *self.projector.parameters()]

    def forward(self, x_q, x_k, order=None):
        q = F.normalize(self.projector(self.backbone(x_q)).float(), dim=1)            # (N, C)
        with torch.no_grad():
            # A group's statistics leave a trace in each of its rows. Were q and k of an image in groups of
            # the same images, that trace would give the key away. So the keys are shuffled.      [S3.3]
            if order is not None:  # over all processes: gather, permute, take this one's share
                x_k = distributed.mine(distributed.gather(x_k)[order])
            k = F.normalize(self.key_encoder(x_k).float(), dim=1)                     # (N, C)
            if order is not None:  # back to x_q's order
                k = distributed.mine(distributed.gather(k)[order.argsort()])
        return q, k

    @torch.no_grad()
    def enqueue(self, keys):
        """Write keys (N, C) over the oldest ones, from the end on to the beginning; any N.      [S3.2]

        Of a batch longer than the queue only the last K keys remain.
        """
        keys = keys[-len(self.queue):]
        rows = (self.pointer + torch.arange(len(keys), device=keys.device)) % len(self.queue)
        self.queue.index_copy_(0, rows, keys)
        self.pointer.copy_((self.pointer + len(keys)) % len(self.queue))


def build_model(args):
    backbone = harness.initialised(common.ResNet18(stem=args.stem, width=args.width), args)
    groups = max(1, args.bn_splits // distributed.size())  # a process is a group already
    return MoCo(backbone, args.dim, args.queue_size, args.head, groups)


@torch.no_grad()
def ema_update(key_parameters, query_parameters, m):
    """Move the key encoder a little towards the query encoder, in place; parameters only, no buffers.

    key_parameters, query_parameters   iterables of tensors of the same shapes, in the same order.
    m         in [0, 1]: 1 leaves the keys' as they are, 0 makes them equal to the queries'.
    Source    He et al. 2019, Eq. 2.
    """
    # theta_k <- m theta_k + (1 - m) theta_q = theta_k + (1 - m) (theta_q - theta_k)                [E2]
    torch._foreach_lerp_(list(key_parameters), list(query_parameters), 1 - m)


# ------------------------------------------------------------------------------------------------
# Loss
# ------------------------------------------------------------------------------------------------


def info_nce(q, k, queue, temperature):
    """MoCo's contrastive loss: pick out each query's own key among all keys of the queue.

    q, k         (N, C) float, unit rows; row i of both comes from image i; k carries no gradient.
    queue        (K, C) float, unit rows: the keys of earlier batches, no gradient.
    temperature  T > 0.
    returns      scalar, the mean over N; chance is log(1 + K).
    Source       He et al. 2019, Eq. 1.
    """
    # L_q = -log( exp(q.k+ / T) / sum_{i=0..K} exp(q.k_i / T) )                                    [E1]
    l_pos = (q * k).sum(dim=1, keepdim=True)                    # (N, 1)
    l_neg = q @ queue.T                                         # (N, K)
    logits = torch.cat([l_pos, l_neg], dim=1) / temperature     # (N, 1+K)
    # The positive stands in column 0, so the "class" of every row is 0.
    return F.cross_entropy(logits, torch.zeros(len(q), dtype=torch.long, device=q.device))


@torch.no_grad()
def contrastive_accuracy(q, k, queue):
    """Share of queries that are closer to their own key than to any of the queue; chance is 1/(1 + K).

    q, k     (N, C) unit rows.  queue (K, C) unit rows.
    returns  scalar in [0, 1]. A lead of less than 1e-3 may be rounding (TF32 on a GPU) and is a miss: where all keys
             are the same, nothing has been found.
    """
    return ((q * k).sum(dim=1) - (q @ queue.T).amax(dim=1) > 1e-3).float().mean()


# ------------------------------------------------------------------------------------------------
# Training (Algorithm 1)
# ------------------------------------------------------------------------------------------------


@harness.command
def main(argv=None):
    args = parse_args(argv)
    with harness.open_run(args, RECIPES, bn_splits=lambda: bn_groups(args.bn_splits, args.batch_size)) as run:
        two_crops = common.TwoCrops(functools.partial(view, args=args, mean=run.dataset.mean, std=run.dataset.std))
        monitor = knn.Monitor(run)

        model = run.place(build_model(args))
        lr = args.step_lr or args.lr * args.batch_size / 256
        optimizer = torch.optim.SGD(model.query_parameters(), lr, momentum=0.9, weight_decay=args.weight_decay,
                                    fused=True)
        milestones = [round(share * run.total_steps) for share in (0.6, 0.8)]  # --v1: epochs 120 and 160 of 200
        schedule = common.LRScheduler(optimizer, lr, run.total_steps, run.warmup_steps,
                                      kind="steps" if args.v1 else "cosine", milestones=milestones)
        network = run.begin(model, optimizer, views=two_crops,
                            chance=f"log(1 + K) = {math.log(1 + args.queue_size):.2f}")
        directions = 2 if args.symmetric else 1
        if args.queue_size > directions * len(run.dataset.train):
            run.say(f"note    --queue-size {args.queue_size}: {len(run.dataset.train)} images make fewer keys an "
                    "epoch:\n        old keys of the query's own picture count as negatives; take less")
        if run.step == 0 and monitor.due:
            run.report(**monitor(model.backbone))                      # the untrained network

        for images, aspect, _ in run.steps():                          # for x in loader              [A1]
            schedule.step(run.position)
            x1, x2 = two_crops(images, aspect, run.random)             # 2 x (N, 3, S, S)             [A1]
            # How keys are shuffled into BatchNorm groups: those of x2, and with --symmetric of x1.   [S3.3]
            order1, order2 = (None if args.no_shuffle_bn else
                              augment.send(run.random.permutation(args.batch_size), run.device) for _ in range(2))
            # First the key encoder follows, then it makes the keys: at m = 0 it is the query encoder. [E2] [A1]
            ema_update(model.key_encoder.parameters(), model.query_parameters(), args.momentum_encoder)
            with run.autocast():
                q1, k2 = network(x1, x2, order2)                       # (N, C)                       [A1]
                if args.symmetric:
                    q2, k1 = network(x2, x1, order1)
            loss = info_nce(q1, k2, model.queue, args.temperature)     #                        [E1] [A1]
            if args.symmetric:
                # Both halves meet the queue as it was: k2, a key of q2's very view, must not be its negative.
                # Their sum, not their mean: the notebook's learning rate is meant for it.
                loss = loss + info_nce(q2, k1, model.queue, args.temperature)

            optimizer.zero_grad(set_to_none=True)
            run.scaler.scale(loss).backward()
            run.scaler.step(optimizer)                                 # update                       [A1]
            run.scaler.update()
            run.record(loss=loss / directions, accuracy=contrastive_accuracy(q1, k2, model.queue))  # per query
            # Last of all: keys that were in the queue already would be their own queries' negatives. [A1]
            # Every process enqueues the keys of all: the queues stay the same.
            model.enqueue(torch.cat([distributed.gather(k) for k in ([k1, k2] if args.symmetric else [k2])]))

            if run.epoch_ends:
                run.report(**monitor(model.backbone))


if __name__ == "__main__":
    main()
