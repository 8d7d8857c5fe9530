"""What are the features worth with labels? Probes, fine-tuning, from scratch.

    python linear.py --checkpoint RUN                    --cached: a linear layer on features of evaluation views,
                                                         computed once: seconds
    python linear.py --checkpoint RUN --probe --test     a linear layer on the frozen network, which sees random
                                                         crops: as papers measure
    python linear.py --checkpoint RUN --finetune         everything trains, from the run's weights
    python linear.py --from-scratch --data ./food-11     everything trains, from random weights: what the labels
                                                         alone give; with --checkpoint on the run's data and network
    python linear.py --weights resnet18.pth --data ./food-11                others' weights, in any of these ways

Sources     MoCo 1911.05722, section 4.1        SimCLR 2002.05709, B.5, B.6
            SimSiam 2011.10566, appendix A      RotNet 1803.07728, 4.1; and the authors' code
Protocols   of       optimiser, lr, weight decay                            epochs                    batch
            MoCo     SGD 30, 0                                              100, / 10 at 60 and 80    256
            SimSiam  LARS 0.1 x bs/256 (code; the paper says 0.02), 0       90, cosine                4096
            SimCLR   SGD + Nesterov 0.1 x bs/256, 0                         90 (CIFAR 100), cosine    4096 (512)
            RotNet   SGD + Nesterov 0.01, 5e-4, on max-pooled AlexNet maps  35, / 5 at 5, 15, 25      192
            here     SGD 0.1 x bs/256, 0                                    100, cosine               256 (cached 1000)
            All freeze the backbone, in eval mode. RotNet's figures for CIFAR-10 are no linear probe: three layers
            with BatchNorm, on unpooled maps of block 2 (SGD 0.1, 5e-4, batch 128, / 5 at 20, 40 and 45 of 100).
            MoCo's own setting is --probe --raw-features --lr 30 --schedule steps; that of SimSiam's code
            --probe --raw-features --optimizer lars --lr 0.1 --epochs 90 --batch-size 4096 (its LARC adapts the
            bias too, ours not)
Views       --crop: photos "resized", a random part of at least 0.08 of the area, as MoCo, SimSiam and SimCLR; toy
            and cifar "pad", shifts by up to 4 px, as RotNet on CIFAR; both with flips. Accuracies are those of
            evaluation views (the centre crop), as in knn.py.
Departures  1. Features are first brought to mean 0 and unit standard deviation over the training images. Methods
               differ widely in the scale of their features, hence papers in their rates, from 0.01 to 30; now one
               rate serves all. It is a fixed affine map, folded into the weights: what is saved is a linear layer
               on the features as they are. --raw-features leaves it out.
            2. The epoch is chosen by validation images (a tenth of the training images where the data has none).
               To train on all and score the test split after the last epoch, as is usual on CIFAR:
               --no-validation --test.
            3. With --label-fraction an epoch keeps its number of images: those that are left are repeated, as in
               RotNet's code, so the baseline is not cut short where labels are few. (It has more steps where they
               are fewer than a batch.)
            4. --finetune and --from-scratch share one recipe, the usual supervised one: 0.2 x bs/256, batch 128,
               weight decay 5e-4, a warm-up. SimCLR fine-tunes at 0.05 x bs/256 (B.5): in short runs that did worse. The
               gradient's norm is kept below 1: LARS leaves large scales in BatchNorm, and without that fine-tuning
               diverges (10 % of ten classes; with it 49.4 %, from scratch 43.5: docs/your-pictures.md).
            5. `toy` takes fewer epochs: see the table below.
Health      The loss starts near log(classes), val_loss with it; val_loss that rises while top1 stands still:
            overfitting. A train_top1 near 100 with a much lower top1: too few labels for so many features; --probe
            and --finetune, with their random crops, get more out of them. `toy` is easy where there are labels:
            200 of them, from scratch, reach 99.9 %, more than any probe. With one per class (--label-fraction
            0.0025) that falls to 34.5 %, while a --probe of SimCLR's run has 96.9 % (one seed, validation images).
"""

import harness  # isort: skip  # before torch: how threads wait, where memory comes from
import functools
import io
import json
import math
import os
import shlex

import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageDraw

import augment
import common
import knn
import pictures
from harness import checkpoint, distributed, flags, weights
from harness.parser import absolute_path
from harness.run import Run, set_up

# ------------------------------------------------------------------------------------------------
# Flags
# ------------------------------------------------------------------------------------------------

# The defaults, way -> flag -> value. lr per 256 images.
PROBED = dict(epochs=100, batch_size=256, optimizer="sgd", lr=0.1, weight_decay=0.0, schedule="cosine",
              warmup_epochs=0.0, eval_every=1, save_every=1)
TRAINED = PROBED | dict(batch_size=128, lr=0.2, weight_decay=5e-4, warmup_epochs=5.0)
CACHED = PROBED | dict(batch_size=1000, eval_every=10, save_every=10)
RECIPES = {"cached": CACHED, "probe": PROBED, "finetune": TRAINED, "from-scratch": TRAINED}
SHORT = dict(epochs=5, batch_size=64, warmup_epochs=0.5)
TOY = {"probe": dict(epochs=10), "finetune": SHORT, "from-scratch": SHORT}  # what the toy set, small and easy, takes
FROZEN = ("cached", "probe")


def network_flags(parser):
    """Whose features, judged in which way, on which images."""
    add, count = parser.flag, functools.partial(harness.number, int)
    network = parser.add_mutually_exclusive_group()
    add("--checkpoint", "the pre-training run: its folder (then last.pt counts, as in the papers) or a .pt file",
        metavar="RUN", type=absolute_path, default=None, group=network)
    add("--weights", "instead of a run, the weights alone: a file of a ResNet-18 with torchvision's names",
        metavar="FILE", type=absolute_path, default=None, group=network)
    weights.program_flag(parser)
    add("--image-size", "without a run: side of a view in pixels", flags.SHAPES, type=count(low=8))
    add("--stem", "with neither run nor weights: first layers of the network", flags.SHAPES,
        choices=("cifar", "imagenet"))
    add("--width", "with neither run nor weights: channels of layer1", flags.SHAPES, type=count(low=1))
    ways = parser.add_mutually_exclusive_group()
    for way, meaning in (("cached", "linear layer on features computed once: seconds (the default)"),
                         ("probe", "linear layer on the frozen network, with random crops: the papers' protocol"),
                         ("finetune", "train everything, from the run's weights"),
                         ("from-scratch", "train everything, from random weights: the baseline of --finetune")):
        ways.add_argument(f"--{way}", dest="way", action="store_const", const=way, help=meaning)
    parser.set_defaults(way="cached")
    add("--data", f"folder of pictures, or {', '.join(pictures.NAMED_DATA)} (default: that of the run, without one "
        "toy); its classes are those to learn", type=flags.data_path, default=None)
    add("--data-root", "where named data sets lie (default: that of the run)", type=absolute_path, default=None)


def parse_args(argv=None):
    """The flags, and the checkpoint that it all starts from: that of the resumed run, or the pre-training run's."""
    shown = RECIPES | {f"{way} of toy": RECIPES[way] | fewer for way, fewer in TOY.items()}
    parser = harness.training_parser(__file__, __doc__, shown, without=(
        "--data", "--data-root", "--recipe", "--image-size", "--view-size", "--stem", "--width", "--init",
        "--knn-every", "--knn-k", "--knn-t", "--knn-split", "--views-png"))
    parser.set_defaults(save_every=None)
    network_flags(parser)
    add, real = parser.flag, functools.partial(harness.number, float)
    add("--label-fraction", "part of the labelled training images that is used, of each class alike, drawn "
        "by --seed; the others do not train", type=real(above=0, high=1), default=1.0)
    add("--layer", "whose pooled output the linear layer reads; RotNet's best is a middle one",
        choices=("layer1", "layer2", "layer3", "layer4"), default="layer4")
    add("--raw-features", "features as they come, as in the papers; the rate must then suit the method "
        "(MoCo: --lr 30)", action="store_true")
    add("--crop", "random views of --probe, --finetune and --from-scratch; pad: shift by up to an eighth of the "
        "side, resized: a part of at least 0.08 of the area, enlarged (default: toy and cifar pad, "
        "others resized)", choices=("pad", "resized"), default=None)
    add("--optimizer", "sgd has momentum 0.9; lars and adamw want a --lr of their own",
        choices=("sgd", "lars", "adamw"))
    add("--schedule", "of the rate; steps: a tenth after 60 and again after 80 %% of the run",
        choices=("cosine", "steps"))
    add("--focal-gamma", "of rotnet.py's focal loss: how much less an easy image counts; 0: plain cross-entropy",
        type=real(low=0), default=0.0)
    add("--focal-alpha", "of the focal loss: a factor of the whole loss", type=real(above=0), default=1.0)
    add("--stop-at-accuracy", "end after the evaluation whose validation top-1 reaches this", metavar="PERCENT",
        type=real(above=0, high=100), default=None)
    add("--eval-every", "epochs between evaluations, each a line in metrics.jsonl and a candidate for linear.pt",
        type=harness.number(int, low=1))
    add("--test", "score the test split, once, at the end, with the weights that validation chose",
        action="store_true")
    add("--no-validation", "train on every labelled training image, choose nothing, and let the last weights "
        "count, as papers do on CIFAR; needs --test", action="store_true")
    args = harness.parse(parser, argv, fixed=("checkpoint", "weights", "label_fraction", "seed", "layer",
                                              "raw_features", "crop", "optimizer", "no_validation"))
    saved = harness.load_checkpoint(args.resume) if args.resume else None
    if saved and args.way != saved["args"]["way"]:
        parser.error(f"--{args.way}: the run to resume is one of --{saved['args']['way']}")
    check_flags(parser, args)
    args.knn_split = "test" if args.no_validation else "val"  # tells all others what is held out, and what chooses
    return args, saved or inherit(args)


def check_flags(parser, args):
    frozen, has_rate = args.way in FROZEN, args.lr or args.step_lr
    frozen_only = "raw-features" if args.raw_features else "layer"
    for wrong, message in (
        (args.way != "from-scratch" and not args.checkpoint and not args.weights,
         "--checkpoint RUN is missing: the pre-training run whose features are to be judged; or --weights FILE, or "
         "--from-scratch, which needs neither"),
        (args.program and not args.checkpoint,
         "--program: builds the network of a run, with the flags of that run; add --checkpoint RUN"),
        (not frozen and (args.layer != "layer4" or args.raw_features),
         f"--{frozen_only}: only for a frozen network, that is --cached or --probe; --{args.way} trains all of it"),
        (args.way == "cached" and args.crop, "--crop: --cached sees evaluation views only; take --probe"),
        (args.no_validation and not args.test, "--no-validation: then nothing would be measured; add --test"),
        (args.no_validation and args.stop_at_accuracy,
         "--stop-at-accuracy: validation images say when to stop; leave --no-validation out"),
        (args.optimizer in ("lars", "adamw") and not has_rate,
         f"--optimizer {args.optimizer}: the default rate is for sgd; add --lr or --step-lr, "
         f"{'0.1' if args.optimizer == 'lars' else '0.001'} for instance"),
        (distributed.launched() and int(os.environ["WORLD_SIZE"]) > 1,
         "linear.py trains on one device: start it without torchrun"),
    ):
        if wrong:
            parser.error(message)


def inherit(args):
    """What was not given comes from the pre-training run, which is returned; pictures are prepared as it knows them."""
    pretrained = weights.load_pretrained(args)
    if pretrained["method"] == "linear":
        start = pretrained["args"]["checkpoint"]
        raise common.UsageError(f"--checkpoint {args.checkpoint}: a run of linear.py itself; " +
                                (f"give the pre-training run it began with, {start}" if start else
                                 "its network alone is taken by --weights"))
    for name in ("data", "data_root", "cache", "skip_unreadable"):
        setattr(args, name, getattr(args, name) or pretrained["args"][name])
    weights.take_shape(args, pretrained, "--checkpoint" if args.checkpoint else "--weights")
    return pretrained


def fill_recipe(args, images, labelled):
    """Give every flag that is still None its default; returns the passes over the images that make an epoch.

    images  those that train, of so many `labelled` ones.
    raises  UsageError for a batch larger than that.
    """
    passes = round(labelled / images)
    recipe = RECIPES[args.way] | (TOY.get(args.way, {}) if args.kind == "toy" else {})
    if args.way != "cached":
        recipe["crop"] = "pad" if args.kind in ("toy", "cifar") else "resized"
    # The table's batch, cut to what there is and so that no short one is left over (which would be dropped).
    steps = math.ceil(passes * images / min(images, recipe["batch_size"]))
    recipe["batch_size"] = math.ceil(passes * images / steps) if args.way in FROZEN else passes * images // steps
    harness.fill_flags(args, recipe)
    pictures.check_batch(args.batch_size, images)
    return passes


# ------------------------------------------------------------------------------------------------
# Images, labels and features
# ------------------------------------------------------------------------------------------------


def open_data(args, pretrained):
    """The source, the pictures packed as the network knows them, and {split: its labelled images}; args complete.

    The test split is opened only where it is asked for.
    raises  UsageError where there is nothing to learn or to measure.
    """
    source = pictures.open_source(args.data, args.data_root, args.download, holdout=flags.holdout(args))
    splits = ["train", *([] if args.no_validation else ["val"]), *(["test"] if args.test else [])]
    if not args.resume and args.knn_split == pretrained["args"]["knn_split"]:
        flags.note_changes(source, args.data, pretrained["args"], splits)
    if pretrained.get("note"):
        source.description.append(pretrained["note"])
    args.kind = source.kind
    harness.fill_flags(args, flags.SHAPES[source.kind])  # the shape of a network without a run
    check_labels(args, source.classes, {s: source.splits[s].counts[0] if source.splits[s] else 0 for s in splits})
    harness.check_stop(args.stop_at_accuracy, chance=100 / len(source.classes))
    dataset = pictures.pack(source, args.image_size, args.cache, splits, args.quiet, args.skip_unreadable)
    dataset.mean, dataset.std = pretrained["mean"] or dataset.mean, pretrained["std"] or dataset.std
    labelled = {split: pictures.labelled(getattr(dataset, split)) for split in splits}
    check_labels(args, source.classes, {split: len(labelled[split]) for split in splits})  # what could be read
    return source, dataset, labelled


def check_labels(args, classes, counts):
    """counts: {split: labelled images}.  raises  UsageError where there is nothing to learn or to measure."""
    fix = {"train": "linear.py needs classes",
           "test": "leave --test out or, for an honest figure, keep a part of validation as the labelled test split",
           "val": "--no-validation --test trains without, or give data that has some"}
    for split, count in counts.items():
        if count == 0:
            raise common.UsageError(f"--data {args.data}: no labelled {split} images; {fix[split]}")
    if len(classes) < 2:
        raise common.UsageError(f"--data {args.data}: one class only, {classes[0]}; there is nothing to tell apart")


def label_subset(labels, fraction, seed):
    """Rows of a stratified part of the labelled images: of each class `fraction`, rounded, at least one image.

    labels   (N,) int64, none -1.
    returns  (n,) int64, ascending. Of one seed, smaller parts lie within larger ones.
    """
    rows = []
    for c in labels.unique().tolist():
        mine = (labels == c).nonzero().flatten()
        order = common.Draws(seed, c).permutation(len(mine))
        rows.append(mine[order[: max(1, round(fraction * len(mine)))]])
    return torch.cat(rows).sort().values


def take_part(split, fraction, seed):
    """A split with part of its labelled images; the split itself where the part is everything."""
    if fraction == 1:
        return split
    rows = label_subset(split.labels, fraction, seed)
    return pictures.Split(split.images[rows], split.labels[rows], split.aspect[rows],
                          [split.paths[i] for i in rows.tolist()])


def view(images, aspect, generator, args, mean, std):
    """One random view of every image, each with its own draw.

    images   (N, 3, S, S) uint8.  aspect (N,) original width / height.  generator: common.Draws.
    returns  (N, 3, size, size) float32, normalised, channels_last.
    """
    if args.crop == "resized":
        x = augment.random_resized_crop(images, args.image_size, scale=(0.08, 1.0), flip=0.5, aspect=aspect,
                                        generator=generator)
    else:
        x = augment.center_crop(images, args.image_size, aspect)
        x = augment.random_crop(x, padding=args.image_size // 8, generator=generator)
        x = augment.random_horizontal_flip(x, generator=generator, inplace=True)
    return augment.normalize(x, mean, std)


def plain_features(backbone, layer, split, dataset, run):
    """(N, C) float32 on the device: the pooled output of a layer for every image of a split, evaluation views."""
    return knn.extract(knn.Layers(backbone, (layer,)), split, dataset, run.device, run.autocast)[layer]


# ------------------------------------------------------------------------------------------------
# Model
# ------------------------------------------------------------------------------------------------


def make_backbone(args, pretrained):
    """The trained network; with --from-scratch a new one of its kind, residual branches not at zero."""
    if args.way != "from-scratch":
        backbone = harness.load_backbone(pretrained, program=args.program)
    elif args.program:
        backbone = weights.build_model(pretrained, args.program).backbone
    else:
        backbone = common.ResNet18(stem=args.stem, width=args.width)
        own = backbone.state_dict()
        if checkpoint.shapes(own) != checkpoint.shapes(pretrained.get("backbone", own)):
            raise common.UsageError("--from-scratch: the backbone of this run is no ResNet18; name the program that "
                                    "trained it: --program FILE.py")
    if args.layer != "layer4" and not isinstance(backbone, common.ResNet18):
        raise common.UsageError(f"--layer {args.layer}: only a ResNet18 has it; leave it out")
    return backbone


class Classifier(nn.Module):
    """A linear layer on the pooled output of one layer of a backbone, standardised.

    frozen       the backbone takes no gradient and stays in eval mode, whatever train() says.
    mean, std    of the features, (C,); 0 and 1 until standardise() is called.
    forward(x)   (N, 3, S, S) -> logits (N, K) float32.
    """

    def __init__(self, backbone, layer, classes, frozen):
        super().__init__()
        self.backbone, self.layer, self.frozen = backbone.requires_grad_(not frozen), layer, frozen
        c = backbone.dim >> (4 - int(layer[-1]))
        self.fc = nn.Linear(c, classes)
        nn.init.normal_(self.fc.weight, std=0.01)  # as in the code of MoCo and SimSiam
        nn.init.zeros_(self.fc.bias)
        self.register_buffer("mean", torch.zeros(c))
        self.register_buffer("std", torch.ones(c))

    def standardise(self, features):
        """Take mean and deviation from features (N, C) of training images."""
        std, self.mean = torch.std_mean(features, dim=0, correction=0)
        # A channel that (nearly) never moves would be blown up to noise: it is kept small instead.
        self.std = std.clamp(min=max(1e-12, 0.01 * std.mean().item()))

    def train(self, mode=True):
        super().train(mode)
        if self.frozen:
            # In train mode BatchNorm would use, and change, statistics of these images.
            self.backbone.eval()
        return self

    def forward(self, x):
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            deepest = self.layer == "layer4"  # a backbone's output; all that one of another kind has
            features = self.backbone(x) if deepest else self.backbone.features(x, (self.layer,))[self.layer]  # (N, C)
        with torch.autocast(x.device.type, enabled=False):
            return self.fc((features.float() - self.mean) / self.std)                      # (N, K)

    @torch.no_grad()
    def plain(self):
        """{"weight" (K, C), "bias" (K,)}: the linear layer that does the same to features as they come."""
        # W ((f - m) / s) + b  =  (W / s) f  +  b - (W / s) m;  in double on the host, rounded once.
        w, b, m, s = (t.cpu().double() for t in (self.fc.weight, self.fc.bias, self.mean, self.std))
        return {"weight": (w / s).float(), "bias": (b - (w / s) @ m).float()}


def check_frozen(backbone, before):
    """raises  RuntimeError where a weight or buffer differs in one bit from `before`, a state dict on the host."""
    changed = [name for name, value in backbone.state_dict().items() if not torch.equal(value.cpu(), before[name])]
    if changed:
        raise RuntimeError(f"the frozen backbone has changed, in {', '.join(changed[:3])} and {len(changed)} tensors "
                           "in all: these figures are not those of the checkpoint's features")


# ------------------------------------------------------------------------------------------------
# Accuracy and what is reported
# ------------------------------------------------------------------------------------------------


def accuracies(logits, truth):
    """{"top1", "top5", "class_mean"} in percent: shares of all images, and the mean of the classes' top-1.

    logits  (N, K).  truth (N,) int64 in 0..K-1. Classes without images do not count in class_mean.
    """
    # Stable: of equal logits the first class wins, as with argmax. With K < 5 the top 5 are all.
    right = logits.sort(dim=1, descending=True, stable=True).indices[:, :5] == truth[:, None]
    images = truth.bincount(minlength=logits.shape[1])
    named = truth[right[:, 0]].bincount(minlength=logits.shape[1])
    shares = [n / total for n, total in zip(named.tolist(), images.tolist(), strict=True) if total]
    top1, top5 = (100.0 * right[:, :k].any(dim=1).sum().item() / len(truth) for k in (1, 5))
    return {"top1": top1, "top5": top5, "class_mean": 100.0 * sum(shares) / len(shares)}


def logits_of(features, weight, bias):
    """(N, K) on the host, of features (N, C) and a linear layer on features as they come."""
    return F.linear(features, weight.to(features.device), bias.to(features.device)).cpu()


def validate(run, model, split, features, loss_of):
    """Validation loss and accuracies of the model as it is; None where nothing is held out.

    split  labelled validation images.  features: theirs, of a frozen backbone; or None.
    """
    if split is None:
        return dict.fromkeys(("val_loss", "top1", "top5", "class_mean"))
    if features is None:
        features = plain_features(model.backbone, model.layer, split, run.dataset, run)
    logits = logits_of(features, **model.plain())
    return {"val_loss": loss_of(logits, split.labels).item(), **accuracies(logits, split.labels)}


def draw_confusion(predicted, truth, classes, title):
    """A PNG, bytes: rows are true classes, columns answers, numbers percent of the row. (N,) int64 each."""
    k = len(classes)
    counts = (truth * k + predicted).bincount(minlength=k * k).view(k, k)
    share = counts / counts.sum(dim=1, keepdim=True).clamp(min=1)                            # (K, K)
    cell = min(80, max(16, 900 // k), max(1, 4000 // k))  # pixels
    names = [name if len(name) <= 24 else name[:23] + "…" for name in classes] if cell >= 12 else [""] * k
    lines = [title, "rows: true class, columns: answer; percent of the row"]
    font = knn.font_for([title, *names], max(11, min(16, cell - 4)))
    left, head = (12 + math.ceil(max(map(font.getlength, texts))) for texts in (names, lines))
    top, side = 56 + left, k * cell
    image = Image.new("RGB", (max(left + side, head) + 12, top + side + 12), "white")
    upright = Image.new("L", (left, side))  # names of the columns, written level, then turned by a quarter
    pen, upright_pen = ImageDraw.Draw(image), ImageDraw.Draw(upright)
    pen.text((12, 10), "\n".join(lines), "black", font)
    ink = torch.where(torch.eye(k)[..., None] > 0, torch.tensor([0, 90, 170]), torch.tensor([200, 70, 0]))
    colours = (245 + (ink - 245) * share[..., None].sqrt()).byte()  # the root: a few percent are seen
    image.paste(Image.fromarray(colours.numpy()).resize((side, side), 0), (left, top))
    for i, name in enumerate(names):
        pen.text((left - 6, top + cell * i + cell // 2), name, "black", font, anchor="rm")
        upright_pen.text((6, cell * i + cell // 2), name, 255, font, anchor="lm")
    image.paste("black", (left, 56), upright.rotate(90, expand=True))
    for i, j in counts.nonzero().tolist() if cell >= 32 else ():
        pen.text((left + cell * j + cell // 2, top + cell * i + cell // 2), f"{100 * share[i, j]:.0f}",
                 "white" if share[i, j] > 0.36 else "black", font, anchor="mm")
    png = io.BytesIO()
    image.save(png, "PNG")
    return png.getvalue()


def score(run, splits):
    """Score splits by linear.pt alone, as predict.py will use it; say and write what came out.

    splits  {"val" or "test": pictures.Split}; of the last one also the table of classes and the picture.
    """
    folder, classes = run.folder.path, run.dataset.classes
    if run.args.no_validation:  # the last state is the one that counts
        checkpoint.save(folder / "linear.pt", harness.load_checkpoint(folder))
    saved = harness.load_checkpoint(folder / "linear.pt")
    backbone = harness.load_backbone(saved, run.device, run.args.program)
    scores, lines = {}, []
    for name, split in splits.items():
        features = plain_features(backbone, saved["layer"], split, run.dataset, run)
        logits = logits_of(features, **saved["classifier"])
        scores[name] = {"images": len(split), **accuracies(logits, split.labels)}
        lines.append(f"{name:8}top-1 {scores[name]['top1']:.2f} %   top-5 {scores[name]['top5']:.2f} %   "
                     f"mean of classes {scores[name]['class_mean']:.2f} %   of {len(split):,} images")
    predicted, title = logits.argmax(dim=1), {"val": "validation", "test": "test"}[name]
    picture = draw_confusion(predicted, split.labels, classes,
                             f"{title}: {len(split):,} images, top-1 {scores[name]['top1']:.2f} %")
    run.say("\n".join([f"\n{title} images, linear.pt of step {saved['step']:,}:",
                       *knn.class_table(predicted, split.labels, classes), "", *lines,
                       f"wrote   {folder / 'linear.pt'}"]))
    for name, content in (("confusion.png", picture), ("scores.json", json.dumps(scores, indent=1).encode())):
        checkpoint.save(folder / name, content)
        run.say(f"wrote   {folder / name}")
    program = ["--program", run.args.program] if run.args.program else []
    run.next_command = shlex.join(["python", "predict.py", "--checkpoint", folder.as_posix(), *program, "image.jpg"])


# ------------------------------------------------------------------------------------------------
# Training
# ------------------------------------------------------------------------------------------------


def make_batches(args, train, passes, features, device):
    """`passes` over the split an epoch; with --cached its features (N, C) come instead of its images."""
    if args.way == "cached":
        torch.set_num_threads(1)  # steps so small take longer when CPU cores must wait for each other
        train = pictures.Split(features, train.labels, train.aspect, train.paths, held={features.device: features})
    # A short last batch would spoil the statistics of a BatchNorm that trains; frozen ones do not mind.
    return pictures.Batches(train, args.batch_size, device, args.seed, drop_last=args.way not in FROZEN, passes=passes)


def make_optimizer(args, parameters, lr):
    if args.optimizer == "lars":
        from simclr import LARS
        return LARS(parameters, lr, momentum=0.9, weight_decay=args.weight_decay)
    if args.optimizer == "adamw":
        return torch.optim.AdamW(parameters, lr, weight_decay=args.weight_decay, fused=True)
    return torch.optim.SGD(parameters, lr, momentum=0.9, weight_decay=args.weight_decay, fused=True)


def backward(model, loss, optimizer, scaler):
    """The gradients; of a network that trains as a whole their norm is clipped at 1 (departure 4)."""
    scaler.scale(loss).backward()
    if not model.frozen:
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)


def make_loss(args, classes):
    """The loss, and in words what it is for a network that knows nothing."""
    loss_of, formula = F.cross_entropy, f"log({classes})"
    if (args.focal_gamma, args.focal_alpha) != (0, 1):
        from rotnet import focal_loss
        loss_of = functools.partial(focal_loss, gamma=args.focal_gamma, alpha=args.focal_alpha)
        formula = f"alpha (1 - 1/{classes})^gamma log({classes})"
    chance = args.focal_alpha * (1 - 1 / classes) ** args.focal_gamma * math.log(classes)
    return loss_of, f"{formula} = {chance:.3g}, top-1 {100 / classes:.3g} %"


@harness.command
def main(argv=None):
    args, pretrained = parse_args(argv)
    device, autocast, scaler = set_up(args)
    source, dataset, labelled = open_data(args, pretrained)
    train, val = take_part(labelled["train"], args.label_fraction, args.seed), labelled.get("val")
    passes = fill_recipe(args, len(train), len(labelled["train"]))
    with Run(args, source, device, autocast, scaler, name=f"linear-{args.way}", score="top1", title="top-1",
             best="linear.pt") as run:
        frozen = args.way in FROZEN
        model = run.place(Classifier(make_backbone(args, pretrained), args.layer, len(dataset.classes), frozen))
        of_train, of_val = (  # features of a frozen network: they do not change
            plain_features(model.backbone, args.layer, split, dataset, run) if frozen and split else None
            for split in (train, val))
        if frozen and not args.raw_features:
            model.standardise(of_train)
        threads, x = torch.get_num_threads(), (of_train - model.mean) / model.std if frozen else None
        run.feed(dataset, make_batches(args, train, passes, x, device))

        lr = args.step_lr or args.lr * args.batch_size / 256
        optimizer = make_optimizer(args, [p for p in model.parameters() if p.requires_grad], lr)
        schedule = common.LRScheduler(optimizer, lr, run.total_steps, run.warmup_steps, kind=args.schedule,
                                      milestones=[round(share * run.total_steps) for share in (0.6, 0.8)])
        loss_of, chance = make_loss(args, len(dataset.classes))
        # A program needs the flags of the run that it trained to build its network again.
        more = {"pretrained_args": pretrained.get("pretrained_args", pretrained["args"])} if args.program else {}
        network = run.begin(model, optimizer, chance=chance,
                            extra=lambda: {"layer": args.layer, "classifier": model.plain(), **more})
        run.say(f"trains  on {len(train):,} labelled images, {passes} {'passes' if passes > 1 else 'pass'} per epoch")
        if run.step == 0 and val is not None:
            run.report(**validate(run, model, val, of_val, loss_of))  # the untrained classifier

        for x, aspect, labels in run.steps():
            schedule.step(run.position)
            if args.way == "cached":
                logits = model.fc(x)                                                       # (N, K)
            else:
                x = view(x, aspect, run.random, args, dataset.mean, dataset.std)           # (N, 3, S, S)
                with run.autocast():
                    logits = network(x)                                                    # (N, K)
            loss = loss_of(logits, labels)

            optimizer.zero_grad(set_to_none=True)
            backward(model, loss, optimizer, run.scaler)
            run.scaler.step(optimizer)
            run.scaler.update()
            run.record(loss=loss, train_top1=100.0 * (logits.argmax(dim=1) == labels).float().mean())

            if run.epoch_ends and (run.last or run.epoch % args.eval_every == 0):
                scores = validate(run, model, val, of_val, loss_of)
                run.report(harness.stop_reason(args.stop_at_accuracy, scores["top1"], "images"), **scores)

        torch.set_num_threads(threads)
        if frozen:
            check_frozen(model.backbone, pretrained["backbone"])
        score(run, {split: images for split, images in labelled.items() if split != "train"})


if __name__ == "__main__":
    main()
