"""SimCLR: tell which two views show the same image, among all the views of a batch.

    python simclr.py --data ./food-11           python simclr.py           (the drawn toy set)

Paper       Ting Chen, Simon Kornblith, Mohammad Norouzi and Geoffrey Hinton, "A Simple Framework for
            Contrastive Learning of Visual Representations", ICML 2020, arXiv 2002.05709; code
            google-research/simclr. LARS: You, Gitman and Ginsburg 2017, arXiv 1708.03888
Idea        Two random views of each of N images make 2N outputs. Each output must be closer to its positive,
            the other view's, than to the 2(N - 1) others, its negatives: no queue, no second network. Strong
            colour jitter closes a shortcut (Fig. 6); the head g lets h keep what the loss wants forgotten (4.2).
Symbols     x1, x2  views (N, 3, S, S)         f  backbone;  h = f(x), the feature that is kept
            z  g(h) (N, D)                     g  projection head;  D  its width
            sim(u, v)  cosine of u and v       T  temperature (tau in the paper)
Map         Eq. 1 -> nt_xent() [E1] | Algorithm 1 -> main() [A1] | Section 2.1 f and g -> SimCLR [S2.1]
            Appendix A -> view() [A] | Section 2.3 and B.1, learning rate -> scaled_lr() [B.1]
            LARS Algorithm 1, as in the authors' code -> LARS.step() [L1]
Read on     2.2      LARS, at every batch size, and global BatchNorm: local statistics would leak the answer.
            Fig. 6   Crops without colour jitter: colour histograms alone tell the images apart.
            Fig. 8   The head: leaving it out costs over 10 points against a non-linear one, a linear head 3; the
                     width of z hardly matters.
            Fig. 9   Larger batches win where epochs are few; the gap shrinks with more epochs.
Recipe      flag               paper, ImageNet    paper, CIFAR (B.9)  here
            --optimizer        lars               lars                photos lars, cifar sgd: departure 2
            --lr               0.3 x bs/256       0.5, 1 or 1.5       photos 1.2 x sqrt(bs/256), the rule for
                                                  (code: x bs/256)    small batches; cifar 0.03 x bs/256
            --image-size       224                32                  photos 128, stl10 96 (one GPU), cifar 32
            --batch-size       4096               256 to 4096         photos 256, cifar 512
            --weight-decay     1e-6               1e-6                photos 1e-6, cifar 5e-4
            --epochs           100 (to 1000)      100 to 1000         photos 200, cifar 500
            --temperature      0.1                0.5 (best of 3)     photos 0.1, cifar 0.5
            --min-crop         0.08               0.08                photos 0.08, cifar 0.2: departure 2
            --jitter-strength  1                  0.5                 photos and cifar 0.5: departure 8
            --blur             0.5                0 (32-px views)     photos 0.5, cifar 0
            momentum 0.9, 10 epochs of warm-up (fewer in runs shorter than the recipe's), cosine per step, D = 128
Published   ImageNet, ResNet-50, linear, 1000 epochs: 69.3 %. CIFAR-10, ResNet-50: 94.0 % (B.9).
            CIFAR-10, ResNet-18, the authors' code, 1000 epochs: around 91 %; dkobak/simclr-cifar10, kNN with
            k 10, unweighted, on the test images, after 100 (lr 0.06) / 500 / 1000 epochs: 83.2 / 90.3 / 91.4 %,
            linear on stored features 85.6 / - / 91.7 %, with crops and flips 85.0 / - / 91.9 %. Measured here:
            200 epochs, lr 0.06, H200, one seed: 88.7, linear 89.4 % (commit edfe881; --knn-t 1000: equal votes).
Departures  1. ResNet-18, crops cut from images packed at --image-size; the paper trains ResNet-50 and crops the
               full image. On a GPU the network runs in bf16. Unless --knn-split is test, a tenth of a training set
               that comes without validation images is held out.
            2. `cifar` follows dkobak/simclr-cifar10, which takes SGD, lr and weight decay from SimSiam's
               Appendix D, crops from 0.2, grey 0.1, a hidden layer of 1024. Unlike there (in brackets): warm-up (none),
               BatchNorm in the head (none), one forward for both views (two), residual branches that start
               at zero (they do not), bicubic crops (bilinear), views normalised (in [0, 1]), the cosine per
               step (per epoch), a last, short batch left out (kept), no bias in the head (there is), first
               convolution as the others (PyTorch's default).
            3. --recipe paper takes B.9's values for CIFAR, and for ResNet-18 the authors' first command (March 2020);
               since June 2020 theirs is --recipe paper --weight-decay 1e-4 --proj-layers 3.
            4. The output of g has BatchNorm without shift, as in the authors' code (the paper is silent); the
               code's scale is left out too, as SimSiam does. --hidden-dim stays as it is whatever --width is;
               the code's is the width of h: set both.
            5. Views are normalised by mean and standard deviation; the authors' code leaves them in [0, 1].
            6. `toy` takes SGD, a higher lr and larger crops: see the table below.
            7. BatchNorm sees the batch of all processes, as in the paper, on GPUs only; on CPUs its own share.
            8. `photos` jitters colours half as much as the paper (--recipe paper: as much): kNN of 4,500 photos
               after 20 epochs 47.4 % against 39.1 (two seeds, width 16, 64 px; no GPU has confirmed it).
            9. The authors' code, not the paper, adds the means of z1's and z2's rows: twice this loss (LARS undoes
               the factor, but for decay, biases and BatchNorm). Its first step has rate 0, its head starts at
               std 0.01, its convolutions by fan-in, the first block of every stage has a convolution as shortcut;
               its crops are not antialiased and cover at least 0.1, its blur pads with zeros, one sigma a batch, its
               contrast is around each channel's mean. The paper's listing adds brightness; its code, like ours,
               multiplies by it. Its SGD, not ours, is Nesterov's and spares BatchNorm the weight decay.
Health      The loss starts near chance, log(2N - 1), or above it at a low T, and falls; how far depends on N and
            T: only compare runs of the same two. `accuracy` is the share of the 2N outputs that find their
            positive, by chance 1/(2N - 1). Ablations on `toy`, three seeds, --amp off, commits f4d4eda and 4779e98
            (the recipe: accuracy 0.24, kNN 99.2 %; untrained 31.6):
            --no-color-jitter    accuracy 0.93, kNN 31.4 % (two seeds): grey levels alone give the positives away,
                                 glyphs are not needed.
            --no-projector       accuracy 0.14, kNN 79.8 %: the loss now acts on the features themselves.
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

# ------------------------------------------------------------------------------------------------
# Flags
# ------------------------------------------------------------------------------------------------

# The defaults that depend on the data: kind of data -> flag -> value. lr of a batch of 256, see scaled_lr().
RECIPES = {
    "toy": dict(image_size=32, stem="cifar", width=16, epochs=4, batch_size=64, lr=0.8, weight_decay=1e-4,
                warmup_epochs=0.4, proj_layers=2, min_crop=0.4, blur=0.0, grey=0.2, jitter_strength=0.5,
                temperature=0.5, hidden_dim=128, optimizer="sgd", lr_scaling="linear", knn_every=1),
    "cifar": dict(image_size=32, stem="cifar", width=64, epochs=500, batch_size=512, lr=0.03,
                  weight_decay=5e-4, warmup_epochs=10.0, proj_layers=2, min_crop=0.2, blur=0.0, grey=0.1,
                  jitter_strength=0.5, temperature=0.5, hidden_dim=1024, optimizer="sgd",
                  lr_scaling="linear", knn_every=5),
    "stl10": dict(image_size=96, stem="imagenet", width=64, epochs=200, batch_size=256, lr=1.2,
                  weight_decay=1e-6, warmup_epochs=10.0, proj_layers=2, min_crop=0.08, blur=0.5, grey=0.2,
                  jitter_strength=1.0, temperature=0.1, hidden_dim=512, optimizer="lars",
                  lr_scaling="sqrt", knn_every=5),
    "photos": dict(image_size=128, stem="imagenet", width=64, epochs=200, batch_size=256, lr=1.2,
                   weight_decay=1e-6, warmup_epochs=10.0, proj_layers=2, min_crop=0.08, blur=0.5, grey=0.2,
                   jitter_strength=0.5, temperature=0.1, hidden_dim=512, optimizer="lars",
                   lr_scaling="sqrt", knn_every=5),
    "paper": dict(image_size=128, stem="imagenet", width=64, epochs=200, batch_size=256, lr=1.2,
                  weight_decay=1e-6, warmup_epochs=10.0, proj_layers=2, min_crop=0.08, blur=0.5, grey=0.2,
                  jitter_strength=1.0, temperature=0.1, hidden_dim=512, optimizer="lars",
                  lr_scaling="sqrt", knn_every=5),
    "paper-cifar": dict(image_size=32, stem="cifar", width=64, epochs=1000, batch_size=512, lr=1.0,
                        weight_decay=1e-6, warmup_epochs=10.0, proj_layers=2, min_crop=0.08, blur=0.0, grey=0.2,
                        jitter_strength=0.5, temperature=0.5, hidden_dim=512, optimizer="lars",
                        lr_scaling="linear", knn_every=5),
}


def parse_args(argv=None):
    parser = harness.training_parser(__file__, __doc__, RECIPES)
    add = parser.flag
    add("--min-crop", "smallest crop, fraction of the picture's area; too small: two crops share nothing",
        type=harness.number(float, above=0, high=1))
    add("--blur", "chance of a Gaussian blur; not for views of 32 px",
        type=harness.number(float, low=0, high=1))
    add("--grey", "chance of a view without colour", type=harness.number(float, low=0, high=1))
    add("--jitter-strength", "s of the colour jitter; too weak: colours alone tell the images apart",
        type=harness.number(float, low=0, high=2.5))
    add("--temperature", "T of the loss; too low: only the hardest negatives count, too high: all alike",
        type=harness.number(float, above=0))
    add("--proj-layers", "layers of the projection head", type=int, choices=(2, 3))
    add("--hidden-dim", "width of its hidden layers", type=harness.number(int, low=1))
    add("--dim", "width D of z; little depends on it", type=harness.number(int, low=2), default=128)
    add("--optimizer", "lars, the paper's, wants another --lr and --weight-decay than sgd",
        choices=("sgd", "lars"))
    add("--lr-scaling", "linear: the rate is lr x batch/256; sqrt: lr x sqrt(batch/256), for small batches "
        "and few epochs, where --lr 1.2 is the paper's 0.075 x sqrt(batch)", choices=("linear", "sqrt"))
    add("--no-projector", "ablation: z = h, the loss acts on the features themselves", action="store_true")
    add("--no-color-jitter", "ablation: views keep their colours, but for --grey", action="store_true")
    return harness.parse(parser, argv, fixed=("optimizer",))


# ------------------------------------------------------------------------------------------------
# Views (Appendix A)
# ------------------------------------------------------------------------------------------------


def view(images, aspect, generator, args, mean, std):
    """One random view of every image, each with its own draw.                                      [A]

    images   (N, 3, H, H) uint8, as packed.  aspect (N,) original width / height.  generator: common.Draws.
    returns  (N, 3, S, S) float32, normalised, channels_last; S is --view-size, else --image-size.
    """
    s, size = args.jitter_strength, args.view_size or args.image_size
    x = augment.random_resized_crop(images, size, scale=(args.min_crop, 1.0), flip=0.5, aspect=aspect,
                                    interpolation="bicubic", generator=generator)
    # With p = 0 the jitter still takes its draws: the ablation's crops are those of the full recipe.
    p = 0.0 if args.no_color_jitter else 0.8
    x = augment.color_jitter(x, 0.8 * s, 0.8 * s, 0.8 * s, 0.2 * s, p=p, generator=generator, inplace=True)
    x = augment.random_grayscale(x, p=args.grey, generator=generator, inplace=True)
    # The kernel spans a tenth of the side, rounded to an odd number of pixels as in the authors' code.
    x = augment.gaussian_blur(x, sigma=(0.1, 2.0), p=args.blur, kernel_size=2 * (size // 20) + 1,
                              generator=generator, inplace=True)
    return augment.normalize(x, mean, std)


# ------------------------------------------------------------------------------------------------
# Model
# ------------------------------------------------------------------------------------------------


class SimCLR(nn.Module):
    """Encoder f = backbone, and projection head g, which is thrown away after training.          [S2.1]

    backbone     maps x to h (N, backbone.dim).
    dim          D, the width of z.  hidden_dim: that of g's hidden layers.  proj_layers: 2 or 3.
    forward(x)   (N, 3, S, S) -> z (N, D); without projector z = h.
    Source       Chen et al. 2020, Section 2.1 (2 layers) and the authors' code; 3 layers: their SimCLRv2.
    """

    def __init__(self, backbone, dim=128, hidden_dim=512, proj_layers=2, projector=True):
        super().__init__()
        self.backbone = backbone
        self.projector = nn.Identity()
        if projector:
            c, hidden = backbone.dim, []
            for _ in range(proj_layers - 1):
                hidden += [nn.Linear(c, hidden_dim, bias=False), nn.BatchNorm1d(hidden_dim),
                           nn.ReLU(inplace=True)]
                c = hidden_dim
            # The output's BatchNorm has no shift: z stays centred, so outputs cannot all point one way.
            output = [nn.Linear(c, dim, bias=False), nn.BatchNorm1d(dim, affine=False)]
            self.projector = nn.Sequential(*hidden, *output)

    def forward(self, x):
        return self.projector(self.backbone(x))   # (N, D)


def build_model(args):
    # Every residual branch starts at zero: each block begins as its shortcut (the authors' code).
    backbone = harness.initialised(common.ResNet18(stem=args.stem, width=args.width, zero_init_residual=True), args)
    return SimCLR(backbone, args.dim, args.hidden_dim, args.proj_layers, projector=not args.no_projector)


# ------------------------------------------------------------------------------------------------
# Loss
# ------------------------------------------------------------------------------------------------


def similarities(z1, z2):
    """sim(z_i, z_j) for all pairs of the 2N outputs; -inf on the diagonal, for none is its own negative.

    z1, z2   (N, D) float, any length; row i of both comes from image i, but from different views.
    returns  (2N, 2N) float32: rows and columns 0..N-1 are z1, N..2N-1 are z2, so i and i+N are positives;
             and positive (2N,) int64, the column of each row's positive.
    memory   4 N^2 numbers: one product of matrices, never a tensor of N x N x D.
    raises   ValueError where the shapes differ.
    """
    if z1.shape != z2.shape:
        raise ValueError(f"z1 and z2 must have the same shape, got {tuple(z1.shape)} and {tuple(z2.shape)}")
    # No bf16 even inside autocast: it keeps 8 bits (float32 24, TF32 on a GPU 11), and differences of 0.01 / T
    # decide between negatives.
    with torch.autocast(z1.device.type, enabled=False):
        z = F.normalize(torch.cat([z1, z2]).float(), dim=1)                # (2N, D)                 [E1]
        s = (z @ z.T).fill_diagonal_(-math.inf)                            # (2N, 2N)                [E1]
    return s, torch.arange(len(z), device=z.device).roll(len(z1))


def nt_xent(z1, z2, temperature):
    """Normalised, temperature-scaled cross-entropy: pick out each output's positive among all others.

    z1, z2       (N, D) float, any length; row i of both comes from image i, but from different views.
    temperature  T > 0.
    returns      scalar, the mean over the 2N rows; chance (all outputs alike) is log(2N - 1).
    raises       ValueError where the shapes differ.
    Source       Chen et al. 2020, Eq. 1 and Algorithm 1 (whose pairs are rows 2k-1 and 2k: the same sum).
    """
    s, positive = similarities(z1, z2)
    # l(i, j) = -log( exp(s_ij / T) / sum_{k != i} exp(s_ik / T) ),  j the positive of i;  exp(-inf) = 0  [E1]
    return F.cross_entropy(s / temperature, positive)


@torch.no_grad()
def contrastive_accuracy(z1, z2):
    """Share of the 2N outputs whose positive is the most similar of all others; chance is 1/(2N - 1).

    z1, z2   as for nt_xent.
    returns  scalar in [0, 1].
    """
    s, positive = similarities(z1, z2)
    return (s.argmax(dim=1) == positive).float().mean()


# ------------------------------------------------------------------------------------------------
# Training (Algorithm 1)
# ------------------------------------------------------------------------------------------------


class LARS(torch.optim.Optimizer):
    """SGD with momentum whose step on each weight matrix is in proportion to that matrix's norm.

    lr             already scaled to the batch size.
    weight_decay   added to the gradient before the norms are taken.  eta: the trust coefficient.
    Parameters of one dimension (biases, BatchNorm) take plain momentum steps: no decay, no adaptation.
    raises         ValueError for a negative lr, momentum, weight_decay or eta.
    Source         You et al. 2017, Algorithm 1, in the form of the authors' code of SimCLR: |g| is the norm of the
                   sum dL/dw + wd w, not the sum of both norms.
    """

    def __init__(self, params, lr, momentum=0.9, weight_decay=0.0, eta=1e-3):
        if min(lr, momentum, weight_decay, eta) < 0:
            raise ValueError("lr, momentum, weight_decay and eta must not be negative, got "
                             f"{lr}, {momentum}, {weight_decay}, {eta}")
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay, eta=eta))

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            trained = [w for w in group["params"] if w.grad is not None]
            matrices, vectors = [w for w in trained if w.ndim > 1], [w for w in trained if w.ndim <= 1]
            weights, g = [*matrices, *vectors], []
            if not weights:
                continue
            # Operations on lists of tensors: far fewer requests to a GPU than one by one.
            if matrices:
                # g = dL/dw + wd w;  ratio = eta |w| / |g|                                            [L1]
                g = torch._foreach_add([w.grad for w in matrices], matrices, alpha=group["weight_decay"])
                w_norm, g_norm = (torch.stack(torch._foreach_norm(tensors)) for tensors in (matrices, g))
                # With ratio 0, weights that start at zero would stay there for ever.
                moves = (w_norm > 0) & (g_norm > 0)
                ratio = torch.where(moves, group["eta"] * w_norm / g_norm, 1.0)                # (matrices,)
                torch._foreach_mul_(g, list(ratio.unbind()))
            # v = m v + lr ratio g;  w = w - v.  lr stands inside: v remembers earlier rates.          [L1]
            for w in weights:
                if "velocity" not in self.state[w]:
                    self.state[w]["velocity"] = torch.zeros_like(w)
            velocities = [self.state[w]["velocity"] for w in weights]
            torch._foreach_mul_(velocities, group["momentum"])
            torch._foreach_add_(velocities, [*g, *(w.grad for w in vectors)], alpha=group["lr"])
            torch._foreach_sub_(weights, velocities)
        return loss


def scaled_lr(lr, batch_size, scaling):
    """The rate per step of a batch from the rate per 256 images.                                   [B.1]

    Source  Chen et al. 2020: linear, 0.3 batch/256 (Section 2.3); sqrt, 0.075 sqrt(batch), which is
            1.2 sqrt(batch/256) (Appendix B.1). The two agree at a batch of 4096.
    """
    return lr * (batch_size / 256 if scaling == "linear" else math.sqrt(batch_size / 256))


@harness.command
def main(argv=None):
    args = parse_args(argv)
    with harness.open_run(args, RECIPES) as run:
        two_crops = common.TwoCrops(functools.partial(view, args=args, mean=run.dataset.mean, std=run.dataset.std))
        monitor = knn.Monitor(run)

        model = run.place(build_model(args))
        lr = args.step_lr or scaled_lr(args.lr, args.batch_size, args.lr_scaling)
        if args.optimizer == "lars":
            optimizer = LARS(model.parameters(), lr, momentum=0.9, weight_decay=args.weight_decay)
        else:
            optimizer = torch.optim.SGD(model.parameters(), lr, momentum=0.9, weight_decay=args.weight_decay,
                                        fused=True)
        schedule = common.LRScheduler(optimizer, lr, run.total_steps, run.warmup_steps)
        network = run.begin(model, optimizer, views=two_crops, sync_bn=True,
                            chance=f"log(2N - 1) = {math.log(2 * args.batch_size - 1):.2f} (all outputs alike)")
        if run.step == 0 and monitor.due:
            run.report(**monitor(model.backbone))                      # the untrained network

        for images, aspect, _ in run.steps():                          # for sampled minibatch       [A1]
            schedule.step(run.position)
            x1, x2 = two_crops(images, aspect, run.random)             # 2 x (N, 3, S, S)            [A1]
            with run.autocast():
                # Both views in one forward: BatchNorm's statistics are those of all 2N.
                z1, z2 = network(torch.cat([x1, x2])).chunk(2)         # 2 x (N, D)                  [A1]
            # Negatives come from all processes, and gradients go back to them.
            z1, z2 = (harness.gather_with_gradient(z.float()) for z in (z1, z2))
            loss = nt_xent(z1, z2, args.temperature)                   #                        [E1] [A1]

            optimizer.zero_grad(set_to_none=True)
            run.scaler.scale(loss).backward()
            run.scaler.step(optimizer)                                 # update                      [A1]
            run.scaler.update()
            run.record(loss=loss, accuracy=contrastive_accuracy(z1, z2))

            if run.epoch_ends:
                run.report(**monitor(model.backbone))


if __name__ == "__main__":
    main()
