"""Weighted k-nearest-neighbour classification on frozen features: function, monitor and command.

    python knn.py --checkpoint runs/simsiam-toy-.../last.pt --neighbours grid.png
    python knn.py --weights resnet18.pth --data ./food-11          (a ResNet-18 from elsewhere)
    python knn.py --checkpoint ... --split train --map map.png --features train.npz

How good are features without labels? Keep the network fixed, let the k training images nearest to a
validation image vote on its class, and count how often they are right. Nothing is trained, and there is little to tune.

Source      Wu et al. 2018, arXiv 1805.01978, Section 3.4: k 200, cosine similarity s, votes exp(s / 0.07), on their
            128-d output. The temperature 0.1 is that of MoCo's CIFAR notebook (again on the 128-d output).
Features    the backbone's pooled output in eval mode (never the projector, unless --projector asks for it), of
            the centre crop of each image; bank = labelled training images. (Without labels --neighbours still
            shows what lies near what; there is no accuracy.)
--map       thumbnails of up to 800 images of --split, on a plane by their features of unit length: near is alike.
--features  all images of --split, also those without labels: f = numpy.load(FILE) has f["features"] (N, C) float32,
            f["files"] (N,), f["labels"] (N,) int64, places in f["classes"] (K,), -1: none. Row i is the same image.
"""

import harness.threads  # isort: skip  # noqa: F401  # before torch: how threads wait, where memory comes from
import colorsys
import contextlib
import functools
import io
import math
import os
import time
import warnings

import numpy as np
import torch
import torch.nn.functional as F
import torchvision.transforms.functional as TF
from PIL import Image, ImageDraw, ImageFont
from torchvision.utils import save_image

import augment
import common
import pictures
from harness import flags, weights
from harness.checkpoint import save
from harness.command import command
from harness.distributed import is_main
from harness.parser import Parser, file_to_write, number, path, png_file

# ------------------------------------------------------------------------------------------------
# The classifier
# ------------------------------------------------------------------------------------------------


def nearest(queries, bank, k):
    """The k most similar rows of the bank for every query, by cosine.

    queries  (Q, C) float.  bank (M, C) float.  Rows need not have unit length.
    returns  similarities (Q, k) in [-1, 1] and bank row numbers (Q, k), nearest first.
    memory   two chunks of similarities, 128 x M, whatever Q is.  On a GPU they are products in TF32, exact to 1e-3.
    raises   ValueError where k exceeds the bank.
    """
    if k > len(bank):
        raise ValueError(f"k = {k} neighbours from a bank of {len(bank)}")
    queries, bank = F.normalize(queries.float(), dim=1), F.normalize(bank.float(), dim=1)
    found = [(part @ bank.T).topk(k) for part in queries.split(128)]      # (n, M), of which (n, k)
    return torch.cat([best.values for best in found]), torch.cat([best.indices for best in found])


def knn_predict(queries, bank, bank_labels, num_classes, k=200, temperature=0.1):
    """Class scores by weighted vote: every neighbour adds exp(similarity / temperature) to its class.

    queries      (Q, C) float.  bank (M, C) float.  bank_labels (M,) int64 in [0, num_classes).
    k            clamped to M with a warning.
    returns      (Q, num_classes) float, not normalised; argmax is the predicted class.
    raises       ValueError for a label outside the classes (an unlabelled -1 cannot vote).
    Source       Wu et al. 2018, Section 3.4 (there temperature 0.07).
    """
    if len(bank) == 0 or int(bank_labels.min()) < 0 or int(bank_labels.max()) >= num_classes:
        raise ValueError(f"bank labels must lie in 0..{num_classes - 1} and there must be some")
    if k > len(bank):
        warnings.warn(f"k = {k} exceeds the bank's {len(bank)} images; k = {len(bank)} is used", stacklevel=2)
        k = len(bank)
    return vote(*nearest(queries, bank, k), bank_labels, num_classes, temperature)


def vote(similarity, rows, bank_labels, num_classes, temperature):
    """Scores (Q, num_classes) from what nearest() found, similarity and rows (Q, k). See knn_predict."""
    votes = torch.exp(similarity / temperature)                           # (Q, k)
    scores = torch.zeros(len(votes), num_classes, device=votes.device)
    return scores.scatter_add_(1, bank_labels.to(votes.device)[rows], votes)


# ------------------------------------------------------------------------------------------------
# Features of a split
# ------------------------------------------------------------------------------------------------


def evaluated_share(size):
    """Evaluations show a central square; its side as a share of the shorter side, for views of `size` pixels."""
    return 0.875 if size > 64 else 1.0


def evaluation_view(images, aspect, size, mean, std):
    """What every evaluation feeds the network: the central square of the original picture, normalised.

    images   (N, 3, S, S) uint8, squashed.  aspect (N,) host float, original width / height.
    returns  (N, 3, size, size) float32. Above 64 px the square keeps 7/8 of the shorter side, as in the
             usual resize to 256 and crop of 224; small pictures are kept whole.
    """
    return augment.normalize(augment.center_crop(images, size, aspect, evaluated_share(size)), mean, std)


@torch.no_grad()
def extract(network, split, dataset, device, autocast, batch_size=None, view=evaluation_view):
    """Features of every image of a split, in order, each exactly once.

    network     maps (n, 3, S, S) to {name: (n, C)}; put into eval mode meanwhile, then left as it was.
    batch_size  None: 1000 on a GPU, 250 for more than 64 px; 125 on a CPU, whose cache would not hold more.
    view        what it sees of the images; arguments and result as those of evaluation_view().
    returns     {name: (N, C) float32 on the device}.
    raises      UsageError for features that are not finite.
    """
    was_training = network.training
    network.eval()
    parts = {}
    batch_size = batch_size or (125 if device.type == "cpu" else 1000 if dataset.size <= 64 else 250)
    loader = pictures.Batches(split, batch_size, device, shuffle=False, drop_last=False)
    for images, aspect, _, _ in loader.batches(0):
        with autocast():
            x = view(images, aspect, dataset.size, dataset.mean, dataset.std)
            for name, features in network(x).items():
                parts.setdefault(name, []).append(features.float())
    network.train(was_training)
    parts = {name: torch.cat(rows) for name, rows in parts.items()}
    if not all(features.isfinite().all() for features in parts.values()):
        raise common.UsageError("the features are not finite: try --amp off; in training a lower --lr")
    return parts


# ------------------------------------------------------------------------------------------------
# Health, which needs no labels
# ------------------------------------------------------------------------------------------------


def some(split, most):
    """At most so many images of a split, evenly spaced: a view, not a copy."""
    step = math.ceil(len(split) / most)
    return pictures.Split(split.images[::step], split.labels[::step], split.aspect[::step], split.paths[::step],
                          held={device: images[::step] for device, images in split.held.items()})


def effective_rank(features):
    """How many directions the features use: from 1, all alike but for their length, to C, all equally.

    features  (N, C) float.
    returns   exp of the entropy of the singular values, which are those of features that are not centred.
    Source    RankMe: Garrido et al. 2023, arXiv 2210.02885, Section 3.1.
    """
    # In double precision, which mps lacks, the Gram matrix is exact enough, and quick to compute.
    z = (features.cpu() if features.device.type == "mps" else features).double()
    z = z if len(z) >= z.shape[1] else z.T
    sigma = torch.linalg.eigvalsh((z.T @ z).cpu()).clamp(min=0).sqrt()    # (min(N, C),)
    # p_k = sigma_k / |sigma|_1 + eps;  RankMe = exp(- sum_k p_k log p_k)
    p = sigma / sigma.sum().clamp(min=1e-30) + 1e-7
    return torch.exp(-(p * p.log()).sum()).item()


def pair_view(images, aspect, size, mean, std, generator):
    """A random view, the same recipe for all methods (SimSiam's without blur), so that their figures compare."""
    x = augment.random_resized_crop(images, size, scale=(0.2, 1.0), flip=0.5, aspect=aspect, generator=generator)
    x = augment.color_jitter(x, 0.4, 0.4, 0.4, 0.1, p=0.8, generator=generator, inplace=True)
    x = augment.random_grayscale(x, p=0.2, generator=generator, inplace=True)
    return augment.normalize(x, mean, std)


def agreement(network, split, dataset, device, autocast, seed):
    """Share of images whose second view is nearest to their first among all second views.

    network  as for extract(), of one layer.  seed: of the views, which are the same at every call.
    """
    views = [functools.partial(pair_view, generator=common.Draws(seed, "agreement", which)) for which in range(2)]
    (first,), (second,) = (extract(network, split, dataset, device, autocast, view=view).values() for view in views)
    _, rows = nearest(first, second, 1)                                   # (N, 1)
    return (rows[:, 0] == torch.arange(len(split), device=device)).float().mean().item()


# ------------------------------------------------------------------------------------------------
# The figures of an epoch
# ------------------------------------------------------------------------------------------------


class Layers(torch.nn.Module):
    """A backbone seen as x -> {layer name: pooled features}; anything but a ResNet18 has only its output, as layer4."""

    def __init__(self, backbone, names=("layer4",)):
        super().__init__()
        self.backbone, self.names = backbone, names
        self.training = backbone.training  # and extract() leaves it so

    def forward(self, x):
        if isinstance(self.backbone, common.ResNet18):
            return self.backbone.features(x, self.names)
        return dict.fromkeys(self.names, self.backbone(x))


class Monitor:
    """kNN accuracy of a backbone while it trains: `Monitor(run)(backbone) -> {"knn": 61.3, "knn_20": 62.0, ...}`.

    Percent top-1 of the images of --knn-split, with --knn-k, 20 and 10 neighbours; further layers of a ResNet18 as
    "knn_layer3"; the seconds that it took as "knn_seconds". None in epochs where it is not `due`, or where there are
    no labels to vote with or to check against, which is said. Labels or not: "rank", effective_rank() of at most
    25,600 training images (as in its paper), and agreement() of up to 1,000 images of --knn-split, or, where there are
    none, of training images.
    """

    def __init__(self, run, layers=("layer4",)):
        self.run, self.dataset, self.layers = run, run.dataset, layers
        self.bank, self.queries = (split and pictures.labelled(split)
                                   for split in (run.dataset.train, getattr(run.dataset, run.args.knn_split)))
        self.held_out = some(getattr(run.dataset, run.args.knn_split) or run.dataset.train,
                             min(1000, max(100, len(run.dataset.train) // 20)))  # a twentieth: it should cost little
        self.missing = "no labelled training images" if not self.bank else ""
        self.missing = self.missing or (f"no labelled {run.args.knn_split} images" if not self.queries else "")
        self.missing = self.missing or ("one class only" if len(self.dataset.classes) < 2 else "")
        if self.missing:
            run.say(f"note    no kNN: {self.missing}")

    @property
    def due(self):
        """Whether --knn-every asks for it now: before the first step, after so many epochs, after the last."""
        every = self.run.args.knn_every
        return every > 0 and (self.run.last or self.run.epoch % every == 0)

    def __call__(self, backbone, now=False):
        """now: also where it is not due, unless --knn-every is 0."""
        names = {layer: "knn" if layer == "layer4" else f"knn_{layer}" for layer in self.layers}
        if not (self.due or (now and self.run.args.knn_every)):
            return {"knn": None}
        if not is_main():  # of several processes the first evaluates, the others wait
            return dict.fromkeys(names.values())
        began, run = time.perf_counter(), self.run
        features = functools.partial(extract, dataset=self.dataset, device=run.device, autocast=run.autocast)
        network, last = (Layers(backbone, layers) for layers in (self.layers, self.layers[-1:]))
        bank = features(network, some(self.dataset.train, 25_600) if self.missing else self.bank)
        rows = bank[self.layers[-1]]
        health = {"rank": effective_rank(rows[:: math.ceil(len(rows) / 25_600)]), "agreement":
                  agreement(last, self.held_out, self.dataset, run.device, run.autocast, run.args.seed)}
        if self.missing:
            return dict.fromkeys(names.values()) | health | {"knn_seconds": time.perf_counter() - began}
        queries = features(network, self.queries)
        labels, truth = (split.labels.to(run.device) for split in (self.bank, self.queries))
        scores = {}
        for layer, name in names.items():
            ks = (run.args.knn_k, 20, 10) if layer == "layer4" else (run.args.knn_k,)
            similarity, rows = nearest(queries[layer], bank[layer], min(max(ks), len(labels)))  # nearest first
            for k in ks:
                votes = vote(similarity[:, :k], rows[:, :k], labels, len(self.dataset.classes), run.args.knn_t)
                key = name if k == run.args.knn_k else f"{name}_{k}"
                scores[key] = 100.0 * (votes.argmax(dim=1) == truth).sum().item() / len(truth)
        return scores | health | {"knn_seconds": time.perf_counter() - began}


# ------------------------------------------------------------------------------------------------
# A map, and features for other programs
# ------------------------------------------------------------------------------------------------

ON_MAP = 800  # thumbnails at most
# Of Linux, Windows and macOS; the first four have Chinese, Japanese and Korean letters too.
FONTS = ("NotoSansCJK-Regular.ttc", "msyh.ttc", "Arial Unicode.ttf", "PingFang.ttc", "DejaVuSans.ttf", "arial.ttf")


def find_tsne():
    """scikit-learn's TSNE, or None where it is not installed."""
    try:
        from sklearn.manifold import TSNE
    except ImportError:
        return None
    return TSNE


def plane(features, tsne=None):
    """(N, 2) double, on the host: the two principal components of features (N, C), or with find_tsne() its t-SNE."""
    x = features.cpu().double()
    u, s, _ = torch.linalg.svd(x - x.mean(dim=0), full_matrices=False)
    components = F.pad(u * s, (0, 1))                                     # (N, min(N, C) + 1): of one image too
    if tsne is None or len(x) < 4 or s[0] < 1e-6:  # scikit-learn's dies of features that are all equal
        return components[:, :2]
    embed = tsne(perplexity=min(30, (len(x) - 1) / 3), random_state=0)
    return torch.from_numpy(embed.fit_transform(components[:, :50].numpy())).double()


def free_cells(points, side):
    """Column and row (N, 2) int64 in a grid of side x side >= N cells: for each point in turn the nearest free one.

    points  (N, 2) double, fitted to the grid; a hundredth at each end of an axis lies on the border.
    """
    low, high = points.quantile(torch.tensor([0.01, 0.99]).double(), dim=0)
    wanted = ((points - low) / (high - low).clamp(min=1e-12)).clamp(0, 1) * (side - 1)
    cells, chosen = torch.cartesian_prod(torch.arange(side), torch.arange(side)), []     # (side^2, 2)
    free = cells.double()
    for point in wanted:
        chosen.append(int((free - point).square().sum(dim=1).argmin()))
        free[chosen[-1]] = torch.inf
    return cells[chosen]


def font_for(texts, size):
    """The font that has the most of these letters; Pillow's own has only ASCII."""
    fonts, letters = [ImageFont.load_default(size)], set("".join(texts))
    for name in () if all(letter.isascii() for letter in letters) else FONTS:
        with contextlib.suppress(OSError):
            fonts.append(ImageFont.truetype(name, size))
    missing = [bytes(font.getmask("\uffff")) for font in fonts]  # U+FFFF is no letter: the box that stands for one
    return fonts[min(range(len(fonts)), key=lambda i: sum(bytes(fonts[i].getmask(x)) == missing[i] for x in letters))]


def draw_map(split, features, classes, tsne=None):
    """PNG bytes: up to ON_MAP images of a split as thumbnails where plane() puts them, none overlapping.

    features  (N, C).  Frames have the colour of the class, grey without; up to 20 classes are named at the right.
    """
    # By chance, not every n-th: the classes may stand in turn.
    pick = torch.randperm(len(split.paths), generator=torch.Generator().manual_seed(0))[:ON_MAP]
    points = plane(F.normalize(features[pick.to(features.device)]), tsne)
    side = 1 + int((2 * len(pick)) ** 0.5)  # half of the cells stay free
    cell = min(128, 1800 // side)  # pixels, of them 2 between frames
    colours = [colorsys.hsv_to_rgb(i / len(classes), 0.9, (0.95, 0.6)[i % 2]) for i in range(len(classes))]
    colours = torch.tensor([*colours, (0.65,) * 3])                       # (K + 1, 3), the last for label -1
    canvas = torch.ones(3, side * cell, side * cell)
    for i, (column, row) in zip(pick.tolist(), free_cells(points, side).tolist(), strict=True):
        one, size = slice(i, i + 1), split.images.shape[-1]
        view = evaluation_view(split.images[one], split.aspect[one], size, (0.0,) * 3, (1.0,) * 3)
        here = canvas[:, row * cell : (row + 1) * cell, column * cell : (column + 1) * cell]
        here[:, 1:-1, 1:-1] = colours[split.labels[i]].view(3, 1, 1)
        here[:, 4:-4, 4:-4] = F.interpolate(view, size=(cell - 8,) * 2, mode="bilinear", antialias=True)[0]
    image = TF.to_pil_image(canvas)
    if len(classes) <= 20 and int(split.labels.amax()) >= 0:
        names = [name if len(name) <= 24 else name[:23] + "…" for name in classes]
        font, (width, height), mosaic = font_for(names, 18), image.size, image
        image = Image.new("RGB", (width + 60 + int(max(map(font.getlength, names))),
                                  max(height, 20 + 26 * len(names))), "white")
        image.paste(mosaic)
        pen = ImageDraw.Draw(image)
        for i, name in enumerate(names):
            colour = tuple(int(255 * part) for part in colours[i].tolist())
            pen.rectangle((width + 12, 12 + 26 * i, width + 30, 30 + 26 * i), colour)
            pen.text((width + 40, 21 + 26 * i), name, "black", font, anchor="lm")
    png = io.BytesIO()
    image.save(png, "PNG")
    return png.getvalue()


def features_file(split, features, classes):
    """The bytes of the file of --features, see above. features (N, C)."""
    file = io.BytesIO()
    np.savez(file, features=features.float().cpu().numpy(), files=np.array(split.paths, dtype=str),
             labels=split.labels.numpy(), classes=np.array(classes, dtype=str))
    return file.getvalue()


# ------------------------------------------------------------------------------------------------
# The command
# ------------------------------------------------------------------------------------------------


def parse_args(argv):
    parser = Parser(description=__doc__)
    add = parser.add_argument
    network = parser.add_mutually_exclusive_group(required=True)
    network.add_argument("--checkpoint", type=path, help="a run folder or one of its .pt files")
    network.add_argument("--weights", metavar="FILE", type=path, help="instead of a run, the weights alone: a "
                         "file of a ResNet-18 with torchvision's names")
    weights.program_flag(parser)
    parser.flag("--image-size", "side of the pictures, with --weights", flags.SHAPES, type=number(int, low=8))
    add("--data", type=path, help="other images than those of the run, of any form that the methods take; "
        "with --weights toy, unless given")
    add("--data-root", type=path, help="where a named data set lies (default: that of the run)")
    add("--cache", type=path, help="folder for packed pictures (default: that of the run)")
    add("--skip-unreadable", action="store_true", help="go on without pictures that cannot be read")
    add("--split", choices=("val", "test", "train"), help="whose images are the queries, and on the map and in the "
        "file of features (default: the run's --knn-split, of other --data val); without val images: train")
    add("--k", type=number(int, low=1), nargs="+", default=[200, 20], help="neighbours that vote")
    # Votes are exp(similarity / temperature): below 0.02 they would leave the range of float32.
    add("--temperature", type=number(float, low=0.02), default=0.1, help="of the votes")
    add("--layer", choices=("layer1", "layer2", "layer3", "layer4"), default="layer4",
        help="whose pooled output the features are")
    add("--projector", action="store_true", help="features behind the projector instead; usually worse")
    add("--neighbours", metavar="PNG", type=png_file, help="write queries beside their nearest training images")
    add("--map", metavar="PNG", type=png_file, help="write images on a plane, by t-SNE if scikit-learn is installed, "
        "else by PCA")
    add("--features", metavar="NPZ", type=file_to_write(".npz"), help="write features, files, labels, classes")
    add("--device", default="auto", help="auto (cuda, mps, cpu), or one of them")
    add("--amp", choices=("auto", "bf16", "fp16", "off"), default="auto", help="forward precision")
    args = parser.parse_args(argv)
    if args.projector and args.layer != "layer4":
        parser.error("--projector stands behind layer4: leave --layer out")
    if args.weights and args.projector:
        parser.error("--projector: of --weights the backbone alone is taken")
    if args.weights and args.program:
        parser.error("--program: it builds the network of a run; leave it out")
    if args.checkpoint and args.image_size:
        parser.error("--image-size: of --weights alone; the network of --checkpoint has its own")
    if args.split == "train" and not (args.neighbours or args.map or args.features):
        parser.error("--split train: training images do not vote on themselves; with --neighbours, --map, --features")
    if args.map and args.map == args.neighbours:
        parser.error(f"--map {args.map}: the same file as --neighbours")
    return args


def open_data(args, checkpoint, splits):
    """The data set of a checkpoint, or the one that --data names, packed at the checkpoint's image size.

    Where the checkpoint does not know it, --image-size or the kind of the data says it; the data, mean and std.
    """
    saved, data = checkpoint["args"], args.data or checkpoint["args"]["data"]
    # The run's own images are held out as they were; of others some are where they are to be asked about.
    own = os.path.abspath(data) == os.path.abspath(saved["data"])
    source = pictures.open_source(data, args.data_root or saved["data_root"],
                                  holdout=0.1 * (saved["knn_split"] == "val" if own else len({*splits}) > 1))
    flags.note_changes(source, args.data, saved, splits)
    size = checkpoint["image_size"] or args.image_size or flags.SHAPES[source.kind]["image_size"]
    dataset = pictures.pack(source, size, args.cache or saved["cache"], splits=splits,
                            skip_unreadable=args.skip_unreadable or saved["skip_unreadable"])
    if checkpoint["mean"]:
        dataset.mean, dataset.std = checkpoint["mean"], checkpoint["std"]  # what the network was trained with
    return source, dataset


def network_of(checkpoint, args, device):
    """What --projector, --layer and --program ask for, in eval mode: x -> {name: (N, C)}, and the name."""
    if not args.projector:
        backbone = weights.load_backbone(checkpoint, device, args.program)
        if args.layer != "layer4" and not isinstance(backbone, common.ResNet18):
            raise common.UsageError(f"--layer {args.layer}: only a ResNet18 has it; leave it out")
        return Layers(backbone, (args.layer,)), args.layer
    if checkpoint["method"] == "linear":
        raise common.UsageError("--projector: a linear model has none; give the pre-training run")
    program = args.program or weights.OWN.get(checkpoint["method"])
    model = weights.build_model(checkpoint, program) if program else None
    if not hasattr(model, "projector"):
        raise common.UsageError(f"--projector: a {checkpoint['method']} model has none, or its program is not known: "
                                "--program FILE.py")
    try:
        model.load_state_dict(checkpoint["model"])
    except RuntimeError:
        raise common.UsageError(f"--projector: {program} builds another model than that of this run; name the one that "
                                "trained it: --program FILE.py") from None
    both = torch.nn.Sequential(model.backbone, model.projector).to(device, memory_format=torch.channels_last)
    return Layers(both, ("projector",)), "projector"


def class_table(predicted, truth, classes):
    """Lines of a table: class, images, top-1, and what it is most often taken for."""
    width = min(24, max(5, *(len(name) for name in classes)))
    lines = [f"{'class':{width}}  images   top-1  most often taken for"]
    for c, name in enumerate(classes):
        counts = predicted[truth == c].bincount(minlength=len(classes)).tolist()  # what its images are taken for
        if images := sum(counts):
            share, counts[c] = 100.0 * counts[c] / images, 0
            most = max(counts)
            taken = f"{classes[counts.index(most)]} ({most})" if most else ""
            lines.append(f"{name[:width]:{width}}  {images:6}  {share:5.1f} %  {taken}"[:79].rstrip())
    return lines


def print_accuracy(args, queries, truth, bank, labels, classes):
    """Top-1 and top-5 for every --k, and the table of the first. Features (Q, C), (M, C); labels (Q,), (M,)."""
    labels, truth = labels.to(bank.device), truth.to(bank.device)
    if max(args.k) > len(labels):
        print(f"note    there are {len(labels):,} to vote: k is {len(labels):,} where it is more")
    first, ks = None, list(dict.fromkeys(min(k, len(labels)) for k in args.k))
    similarity, rows = nearest(queries, bank, max(ks))
    for k in ks:
        votes = vote(similarity[:, :k], rows[:, :k], labels, len(classes), args.temperature)
        order = votes.argsort(dim=1, descending=True, stable=True)[:, :5]  # of equal votes the first class's counts
        right = (order == truth[:, None]) & (votes.gather(1, order) > 0)  # a class without a vote was not named
        top1, top5 = (100.0 * right[:, :n].any(dim=1).sum().item() / len(truth) for n in (1, 5))
        print(f"k {k:<4} top-1 {top1:6.2f} %   top-5 {top5:6.2f} %")
        first = order[:, 0] if first is None else first
    print(f"\nk {ks[0]}:")
    print("\n".join(class_table(first.cpu(), truth.cpu(), classes)))


def neighbour_grid(path, queries, bank, query_features, bank_features, rows=10):
    """PNG: each row a query, then its 8 nearest training images, framed green (of the query's label) or red.

    Where one of the two has no label the frame is grey. Queries that are the bank itself do not find themselves.
    Pictures are shown as the network sees them, their central square; small ones enlarged.
    """
    inside = queries is bank
    pick = torch.linspace(0, len(queries.labels) - 1, min(rows, len(queries.labels))).long()
    chosen, size, tiles = query_features[pick.to(query_features.device)], queries.images.shape[-1], []
    _, near = nearest(chosen, bank_features, min(8 + inside, len(bank.labels)))
    for query, row in zip(pick.tolist(), near.tolist(), strict=True):
        row = [i for i in row if not inside or i != query][:8]
        for place, (split, index) in enumerate([(queries, query)] + [(bank, i) for i in row]):
            one = slice(index, index + 1)
            tile = evaluation_view(split.images[one], split.aspect[one], size, (0.0,) * 3, (1.0,) * 3)
            tile = F.interpolate(tile, scale_factor=max(1, 96 // size))
            mine, theirs = queries.labels[query], bank.labels[index] if place else -1
            colour = (0.1, 0.7, 0.2) if mine == theirs else (0.85, 0.1, 0.1)
            colour = (0.5, 0.5, 0.5) if min(mine, theirs) < 0 else colour
            framed = torch.tensor(colour).view(3, 1, 1).repeat(1, tile.shape[-2] + 6, tile.shape[-1] + 6)
            framed[:, 3:-3, 3:-3] = tile[0]
            tiles.append(framed)
    png = io.BytesIO()
    save_image(torch.stack(tiles), png, format="png", nrow=1 + len(row), padding=2, pad_value=1.0)
    save(path, png.getvalue())


@command
def main(argv=None):
    args = parse_args(argv)
    tsne = find_tsne() if args.map else None
    if args.map:
        print("map     " + ("t-SNE, by scikit-learn" if tsne else "PCA; where scikit-learn is installed, t-SNE"))
    checkpoint = weights.load_pretrained(args)
    args.split = args.split or ("val" if args.data else checkpoint["args"]["knn_split"])
    device = common.pick_device(args.device)
    autocast = weights.precision(args, checkpoint, device)
    source, dataset = open_data(args, checkpoint, ("train", args.split))
    print("\n".join([*source.description, *filter(None, [checkpoint.get("note")])]))
    split, bank = getattr(dataset, args.split), pictures.labelled(dataset.train)
    if split is None and args.split == "test":
        raise common.UsageError("--split test: this data has no test images")
    chosen = split or dataset.train
    queries, called = pictures.labelled(chosen), "training" if chosen is dataset.train else args.split
    measured = chosen is not dataset.train and len(queries) > 0 and len(bank) > 0 and len(dataset.classes) > 1
    if not measured:
        if not (args.neighbours or args.map or args.features):
            test = source.splits.get("test")
            other = "--split test has them; " if args.split == "val" and test and test.counts[0] else ""
            raise common.UsageError(f"--data: kNN needs labelled training and labelled {args.split} images, of two "
                                    f"classes; {other}--neighbours PNG shows neighbours without, --map PNG all on a "
                                    "plane")
        queries, bank = chosen, dataset.train

    network, name = network_of(checkpoint, args, device)
    features = extract(network, chosen, dataset, device, autocast)[name]  # (N, C), the labelled images first
    if args.features:
        save(args.features, features_file(chosen, features, dataset.classes))
        print(f"wrote {args.features}: {features.shape[1]} features of {len(chosen):,} {called} images")
    if args.map:
        save(args.map, draw_map(chosen, features, dataset.classes, tsne))
        print(f"wrote {args.map}: {min(ON_MAP, len(chosen)):,} of {len(chosen):,} {called} images; near is alike")
    if not (measured or args.neighbours):
        return

    bank_features = features if bank is chosen else extract(network, bank, dataset, device, autocast)[name]
    features = features[: len(queries)]
    print(f"\n{len(queries):,} {called} images against {len(bank):,} training images, {name}, {features.shape[1]} "
          "features")
    if measured:
        print_accuracy(args, features, queries.labels, bank_features, bank.labels, dataset.classes)
    elif args.split != "train":
        print(f"no accuracy: it takes labelled training and labelled {args.split} images, of two classes")
    if args.neighbours:
        neighbour_grid(args.neighbours, queries, bank, features, bank_features)
        frames = "green: same class" if min(bank.labels.amax(), queries.labels.amax()) >= 0 else "grey: no labels"
        print(f"\nwrote {args.neighbours}: a query, then its nearest training images; {frames}")


if __name__ == "__main__":
    main()
