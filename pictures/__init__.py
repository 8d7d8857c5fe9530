"""Any image source -> one packed uint8 tensor per split, and batches from it.

    source  = pictures.open_source("./food-11")         recognise: fast, reads no picture
    dataset = pictures.pack(source, size=128)           decode everything once; milliseconds the next time
    batches = pictures.Batches(dataset.train, 256, device)
    for images, aspect, labels, index in batches.batches(epoch):  ...

Sources     "toy" (drawn here), cifar10, cifar100, stl10, imagenette, food101 (torchvision), or a folder
            recognised by its shape: train/val/test folders of class folders (also food-11 as published
            in 2021 and 2022), class folders without a split, loose images, unpacked CIFAR batches.
Packed      images (N, 3, S, S) uint8, memory-mapped from the cache folder. Every picture is squashed to
            S x S and remembers its width/height in `aspect`, so that a crop can be drawn in the original
            geometry and no side of the picture is lost. Labelled images come first.
Unreadable  pictures, of whatever kind, stop the program before training: one line, and a file that lists
            them all with the reasons. With --skip-unreadable they are left out, counted and listed.
Label       the position of the class in `classes`; -1 = unlabelled.
"""

from pictures.batches import Batches, Split, check_batch, labelled
from pictures.decoding import decode, one_line
from pictures.folders import Folder, foreign_pictures, no_images
from pictures.sources import FOOD11, NAMED_DATA, Items, lines_of, open_source
from pictures.store import decode_all, pack
from pictures.toy import TOY_COUNT

__all__ = [
    "Batches", "FOOD11", "Folder", "Items", "NAMED_DATA", "Split", "TOY_COUNT", "check_batch", "decode",
    "decode_all", "foreign_pictures", "labelled", "lines_of", "no_images", "one_line", "open_source", "pack",
]
