"""pictures: every source shape is recognised, every picture arrives right, every image counts once."""

import io
import os
import struct
import threading
import unicodedata
import warnings
from pathlib import Path

import pytest
import torch
from PIL import Image, PngImagePlugin

import pictures
from common import UsageError
from pictures import sources, store, toy

ROOT = Path(__file__).resolve().parent.parent


def picture(path, color=(200, 40, 90), size=(40, 30), mode="RGB", **save):
    """A small image file of one colour; the ending says the format."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, color).save(path, **save)
    return path


def class_folders(folder, **counts):
    for c, count in counts.items():
        for i in range(count):
            picture(folder / c / f"{i}.png", (10 * i, 7, len(c)), (20 + i, 30))


def packed(folder, cache, size=16, splits=("train", "val", "test"), holdout=0.1, **options):
    return pictures.pack(pictures.open_source(folder, holdout=holdout), size, cache=cache, splits=splits, quiet=True,
                     **options)


def line_of(error):
    text = str(error.value)
    assert "\n" not in text
    return text


# ---- shapes ------------------------------------------------------------------------------------


def test_food11_of_2021(tmp_path):
    for c in ("00", "02", "10"):
        for i in range(4):
            picture(tmp_path / "f/training/labeled" / c / f"{c}_{i}.jpg")
        picture(tmp_path / "f/validation" / c / "0.jpg")
    for i in range(5):
        picture(tmp_path / "f/training/unlabeled/00" / f"{i}.jpg")
        picture(tmp_path / "f/testing/00" / f"{i}.jpg")
    source = pictures.open_source(tmp_path / "f")
    assert source.classes == ["00", "02", "10"] and source.kind == "photos" and source.name == "f"
    assert "2021" in " ".join(source.description) and all(len(line) <= 78 for line in source.description)
    assert "12 labelled, 5 unlabelled" in " ".join(source.description)
    d = packed(tmp_path / "f", tmp_path / "c")
    assert d.train.labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4 + [-1] * 5
    assert d.val.labels.tolist() == [0, 1, 2]
    assert d.test.labels.tolist() == [-1] * 5  # the folder "00" of that test split is no class
    assert pictures.labelled(d.train).images.data_ptr() == d.train.images.data_ptr()  # no copy
    assert len(pictures.labelled(d.train)) == 12 == len(pictures.labelled(d.train).paths)


def test_food11_of_2022(tmp_path):
    for c in (0, 2, 10):
        for i in range(3):
            picture(tmp_path / "training" / f"{c}_{i}.jpg")
        picture(tmp_path / "validation" / f"{c}_0.jpg")
    for i in range(4):
        picture(tmp_path / "test" / f"000{i}.jpg")
    source = pictures.open_source(tmp_path)
    assert source.classes == ["0", "2", "10"] and "2022" in " ".join(source.description)  # 2 before 10
    d = packed(tmp_path, tmp_path / "c")
    number = {"0": 0, "2": 1, "10": 2}
    for split in (d.train, d.val):
        assert split.labels.tolist() == [number[os.path.basename(p).split("_")[0]] for p in split.paths]
    assert (len(d.train), len(d.val), d.test.labels.tolist()) == (9, 3, [-1] * 4)


def test_tree_with_splits_and_nested_folders(tmp_path):
    class_folders(tmp_path / "Train", cat=3, dog=2)
    picture(tmp_path / "Train/dog/more/deep.bmp")
    class_folders(tmp_path / "valid", dog=2)
    class_folders(tmp_path / "test", cat=1)
    d = packed(tmp_path, tmp_path / "c")
    assert d.classes == ["cat", "dog"] and d.train.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert d.val.labels.tolist() == [1, 1] and d.test.labels.tolist() == [0]


def test_tree_without_validation_holds_out_of_training_only(tmp_path):
    class_folders(tmp_path / "train", a=10, b=20)
    class_folders(tmp_path / "test", a=3, b=3)
    d = packed(tmp_path, tmp_path / "c", holdout=0.2)
    assert d.val.labels.bincount().tolist() == [2, 4] and d.train.labels.bincount().tolist() == [8, 16]
    assert len(d.test) == 6 and all("train" in Path(p).parts for p in d.val.paths)
    assert packed(tmp_path, tmp_path / "c", holdout=0).val is None


def test_class_folders_without_a_split(tmp_path):
    class_folders(tmp_path, c1=1, c2=2, c10=30)
    source = pictures.open_source(tmp_path)
    assert source.classes == ["c1", "c2", "c10"] and "held out" in " ".join(source.description)
    train, val = source.splits["train"], source.splits["val"]
    assert [val.labels.count(c) for c in range(3)] == [0, 1, 3]  # one of two, none of one, a tenth of thirty
    assert not set(train.files) & set(val.files) and len(train.files) + len(val.files) == 33
    os.rename(tmp_path, tmp_path.with_name("moved"))
    moved = pictures.open_source(tmp_path.with_name("moved")).splits["val"]
    assert [os.path.relpath(f, tmp_path.with_name("moved")) for f in moved.files] == [
        os.path.relpath(f, tmp_path) for f in val.files]
    os.rename(tmp_path.with_name("moved"), tmp_path)
    none = pictures.open_source(tmp_path, holdout=0)
    assert none.splits["val"] is None and len(none.splits["train"].files) == 33


def test_a_picture_more_or_less_lets_one_other_change_sides_at_most(tmp_path):
    def sides():
        splits = pictures.open_source(tmp_path).splits
        assert not {*splits["train"].files} & {*splits["val"].files}
        return {*splits["val"].files}

    class_folders(tmp_path, a=30, b=30, c=30)
    before, changes = sides(), []
    for i in range(30, 45):
        picture(tmp_path / "b" / f"{i}.png")
        after = sides()
        changes.append(len((before ^ after) - {str(tmp_path / f"b/{i}.png")}))
        before = after
    for i in range(12):
        os.remove(tmp_path / "b" / f"{i}.png")
        after = sides()
        changes.append(len((before ^ after) - {str(tmp_path / f"b/{i}.png")}))
        before = after
    assert max(changes) == 1
    labels, names = [i % 10 for i in range(50_000)], [f"cifar10/train/{i}" for i in range(50_000)]
    mask = sources.hold_out(labels, names, 0.1)
    assert torch.tensor(labels)[mask].bincount().tolist() == [500] * 10
    assert mask.nonzero().flatten().tolist() != list(range(5_000))


def splits_of(folder):
    """{split: its class names, None among them for unlabelled images}"""
    source = pictures.open_source(folder, holdout=0)
    return {split: {None if label < 0 else source.classes[label] for label in items.labels}
            for split, items in source.splits.items() if items}


@pytest.mark.parametrize("folders, wanted", [
    # what else the names say is the same in all of them, or says nothing
    ("training_set/cat training_set/dog test_set/cat test_set/dog", {"train": "cat dog", "test": "cat dog"}),
    ("train2017/a val2017/a test2017/a", {"train": "a", "val": "a", "test": "a"}),
    ("TrainSet/a TestImages/a", {"train": "a", "test": "a"}),
    ("food_train/a food_val/a food_eval", {"train": "a", "val": "a"}),
    ("1_train/a {val}/a", {"train": "a", "val": "a"}),
    ("one/more/train/a one/more/val/a", {"train": "a", "val": "a"}),
    ("train/train/a train/val/a", {"train": "a", "val": "a"}),
    ("test/train/a test/test/a", {"train": "a", "test": "a"}),
    ("train/a", {"train": "a"}),
    ("s_train/s_train/a s_train/s_train/b s_test/s_test/a", {"train": "a b", "test": "a"}),
    ("train/images val/images labels", {"train": "None", "val": "None"}),
    ("Training/Images/00 Training/Images/01 Test/Images", {"train": "00 01", "test": "None"}),
    ("train/data/cat train/data/dog val/cat val/dog", {"train": "cat dog", "val": "cat dog"}),
    # unlabelled images of the training split
    ("train/a train/b val/a train_unl", {"train": "a b None", "val": "a"}),
    ("unlabelled_train train/a val/a", {"train": "a None", "val": "a"}),
    ("train_labeled/a train_unlabeled/a val/a", {"train": "a None", "val": "a"}),
    ("labeled/a labeled/b unlabeled", {"train": "a b None"}),
    ("cat dog unlabeled", {"train": "cat dog None"}),
    # classes
    ("train_station test_tube bus", {"train": "bus test_tube train_station"}),
    ("train bus car", {"train": "bus car train"}),
    ("carnival/a carnival/b oval/a oval/b", {"train": "carnival oval"}),
    ("images/cat images/dog labels", {"train": "cat dog"}),
    # a loose training split; labels that only the others have are not used
    ("train val/a val/b", {"train": "None", "val": "None"}),
    ("train_images test_images", {"train": "None", "test": "None"}),
])
def test_splits_by_the_names_of_their_folders(tmp_path, folders, wanted):
    for name in folders.split():
        if name == "labels":
            (tmp_path / name).mkdir()
            (tmp_path / name / "0.txt").touch()
        for i in range(0 if name in ("labels", "food_eval") else 2):
            picture(tmp_path / name / f"{i}.png")
    found = splits_of(tmp_path)
    assert {s: " ".join(sorted(map(str, c), key=lambda c: (c == "None", c))) for s, c in found.items()} == wanted


@pytest.mark.parametrize("folders, words", [
    ("cat dog val/cat val/dog test", "has no train folder beside val and test"),
    ("cat dog test_set", "has no train folder beside test_set"),
    ("cat dog {val}/cat {val}/dog", "has no train folder beside {val}"),
    ("train/cat train/dog bus", "has no val folder beside train"),
    ("train_a/cat train_a/dog holdout/cat holdout/dog", "has no val folder beside train_a"),
    ("trainA testA trainB testB", "trainA and trainB both look like the train split"),
    (" ".join(f"train_{i} val_{i}" for i in range(3)), ": train_0 and train_1 both look like the train split"),
    ("test_0 test_1 test_2 test_3", "has no train folder beside test_0 and test_1 and test_2: are these"),
    ("race-track test-track train-track", "beside it is race-track"),
    ("cat/train cat/val dog/train dog/val", "cat, dog has splits of its own"),
    ("train/train/a train/val/a test/a", "train has splits of its own"),
])
def test_two_readings_are_refused(tmp_path, folders, words):
    for name in folders.split():
        for i in range(3):
            picture(tmp_path / name / f"{i}.png")
    with pytest.raises(UsageError) as error:
        pictures.open_source(tmp_path)
    assert words in line_of(error) and "supported layouts" in str(error.value)


@pytest.mark.parametrize("names", ["{0:04}_left {0:04}_right", "0{0}_left 0{0}_right", "{0}_1",
                                   "2023010{0}_120001 2023010{0}_12"])
def test_numbers_in_names_are_not_always_classes(tmp_path, names):
    for split in ("train", "val"):
        for i in range(3):
            for name in names.format(i).split():
                picture(tmp_path / split / f"{name}.jpg")
    assert splits_of(tmp_path) == {"train": {None}, "val": {None}}


@pytest.mark.parametrize("make", [
    lambda split, c, i: f"{split}/{c}_{i}.jpg", lambda split, c, i: f"{split}/{c:02}/{i}.jpg",
    lambda split, c, i: f"{split}{'/labeled' * (split == 'training')}/{c:02}/{i}.jpg"])
def test_the_classes_of_food11_have_names(tmp_path, make):
    for split in ("training", "validation"):
        for c in range(11):
            for i in range(2):
                picture(tmp_path / make(split, c, i))
    picture(tmp_path / "training/unlabeled/0.jpg") if "labeled" in make("training", 0, 0) else None
    assert pictures.open_source(tmp_path).classes == pictures.FOOD11
    (tmp_path / "classes.txt").write_text("\n".join("abcdefghijk") + "\n", encoding="utf-8-sig")
    assert pictures.open_source(tmp_path).classes == list("abcdefghijk")


def test_names_from_classes_txt(tmp_path):
    class_folders(tmp_path, c1=2, c2=2, c10=2)
    for text, classes in (("ant\r\nbee\r\ncow\r\n", ["ant", "bee", "cow"]), ("c10\nc1\nc2", ["c1", "c2", "c10"]),
                          ("ant\nbee", ["c1", "c2", "c10"]), ("ant\nbee\nbee", ["c1", "c2", "c10"])):
        (tmp_path / "classes.txt").write_text(text)
        source = pictures.open_source(tmp_path)
        assert source.classes == classes
        assert ("classes.txt: 2 names for 3 classes" in " ".join(source.description)) == ("c1" not in text
                                                                                           and classes[0] == "c1")


def test_class_names_in_two_forms_of_unicode_are_one(tmp_path):
    for split, form in (("train", "NFC"), ("val", "NFD"), ("test", "NFC")):
        picture(tmp_path / split / unicodedata.normalize(form, "Käse") / "0.png")
    d = packed(tmp_path, tmp_path / "c")
    assert d.classes == ["Käse"] and d.val.labels.tolist() == d.test.labels.tolist() == [0]
    os.rename(tmp_path / "val", tmp_path / "gone")
    picture(tmp_path / "val/KÄSE/0.png")
    os.rename(tmp_path / "gone", tmp_path / "val/.gone")
    with pytest.raises(UsageError, match='"Käse" differs from it in case'):
        pictures.open_source(tmp_path)


def test_a_class_of_the_test_split_alone_matters_where_that_is_asked_for(tmp_path):
    class_folders(tmp_path / "train", a=2, b=2)
    class_folders(tmp_path / "test", a=2, unknown=2)
    assert packed(tmp_path, tmp_path / "c", splits=("train", "val")).test is None
    assert 'class "unknown" of the test split' in " ".join(" ".join(pictures.open_source(tmp_path).description).split())
    with pytest.raises(UsageError, match='class "unknown" of the test split has no training images'):
        packed(tmp_path, tmp_path / "c")


def test_loose_images_in_one_more_folder_and_what_is_ignored(tmp_path):
    for name in ("a.png", "b.jpg", "c.webp", "d.gif", "e.tif", "f.ppm"):
        picture(tmp_path / "inner" / name)
    os.rename(tmp_path / "inner/a.png", tmp_path / "inner/a.PNG")
    picture(tmp_path / "inner/.hidden.png")
    picture(tmp_path / "__MACOSX/x.png")
    (tmp_path / "inner/notes.txt").write_text("no image")
    source = pictures.open_source(tmp_path)
    text = " ".join(" ".join(source.description).split())
    assert source.classes == [] and source.splits["train"].labels == [-1] * 6 and source.splits["val"] is None
    assert "no labels" in text and "1 file that is no image" in text
    assert len(packed(tmp_path, tmp_path / "c").train) == 6


def test_links_are_followed_and_loops_end(tmp_path):
    class_folders(tmp_path / "elsewhere", cat=2)
    class_folders(tmp_path / "d", dog=2)
    (tmp_path / "d/cat").symlink_to(tmp_path / "elsewhere/cat", target_is_directory=True)
    (tmp_path / "d/dog/again").symlink_to(tmp_path / "d/dog", target_is_directory=True)
    source = pictures.open_source(tmp_path / "d", holdout=0)
    assert source.splits["train"].labels == [0, 0, 1, 1]


@pytest.mark.parametrize("make, words", [
    (lambda p: None, "images found"),
    (lambda p: (p / "x.txt").write_text("x"), "no images among 1 files"),
    (lambda p: class_folders(p, val=2, test=2), "no train folder"),
    (lambda p: [class_folders(p / s, a=2) for s in ("train", "val", "valid")], "rename one"),
    (lambda p: [class_folders(p / "train", a=2), class_folders(p / "val", zebra=1)], '"zebra"'),
])
def test_folders_that_cannot_be_understood(tmp_path, make, words):
    make(tmp_path)
    with pytest.raises(UsageError) as error:
        pictures.open_source(tmp_path)
    assert words in line_of(error) and str(tmp_path) in str(error.value)


def test_names_and_paths_that_lead_nowhere(tmp_path):
    for name, words in ((f"{tmp_path}/none", "folder not found"), ("cifar11", "stl10, imagenette, food101"),
                        (str(picture(tmp_path / "a.png")), "is a file")):
        with pytest.raises(UsageError, match=words):
            pictures.open_source(name)
    for name in pictures.NAMED_DATA[1:]:
        with pytest.raises(UsageError) as error:
            pictures.open_source(name, root=tmp_path)
        assert "--download" in line_of(error) and "--data-root" in str(error.value)
        assert str(tmp_path) in str(error.value)


@pytest.mark.parametrize("place", ["food-101", "food-101/food-101", "food-101/train", "mine/food-101/train"])
@pytest.mark.parametrize("given", [".", ".."])
def test_a_folder_of_ones_own_may_bear_the_name_of_a_data_set(tmp_path, place, given):
    class_folders(tmp_path / place, soup=30, bread=30)
    source = pictures.open_source((tmp_path / place / given).resolve())
    assert source.kind == "photos" and sum(source.splits["train"].counts) >= 54


# ---- pixels ------------------------------------------------------------------------------------


def pixel(path, size=8):
    pixels, aspect = pictures.decode(path, size)
    assert pixels.dtype == torch.uint8 and pixels.shape == (3, size, size)
    return pixels[:, size // 2, size // 2].tolist(), aspect


@pytest.mark.parametrize("name, mode, color, expected", [
    ("rgb.png", "RGB", (1, 2, 3), [1, 2, 3]),
    ("grey.png", "L", 77, [77] * 3),
    ("one.png", "1", 1, [255] * 3),
    ("clear.png", "RGBA", (9, 9, 9, 0), [255] * 3),          # transparent shows white
    ("solid.png", "RGBA", (9, 8, 7, 255), [9, 8, 7]),
    ("half.png", "LA", (0, 128), [127] * 3),
    ("deep.png", "I;16", 40000, [156] * 3),                  # 40000 / 257; clipped would be 255
    ("dark.png", "I;16", 514, [2] * 3),                      # clipped would be 255
    ("int.tif", "I", 65535, [255] * 3),
    ("float.tif", "F", 0.5, [128] * 3),
    ("ink.tif", "CMYK", (0, 255, 255, 0), [255, 0, 0]),
])
def test_modes(tmp_path, name, mode, color, expected):
    got, aspect = pixel(picture(tmp_path / name, color, mode=mode))
    assert max(abs(a - b) for a, b in zip(got, expected, strict=True)) <= 1 and aspect == pytest.approx(4 / 3)


def test_palette_transparency_cmyk_jpeg_and_animation(tmp_path):
    image = Image.new("P", (8, 8), 1)
    image.putpalette([0, 0, 0, 10, 200, 30] + [0] * 762)
    image.save(tmp_path / "p.png")
    assert pixel(tmp_path / "p.png")[0] == [10, 200, 30]
    image.save(tmp_path / "t.png", transparency=1)
    assert pixel(tmp_path / "t.png")[0] == [255, 255, 255]
    Image.new("RGB", (8, 8), (5, 6, 7)).save(tmp_path / "key.png", transparency=(5, 6, 7))
    assert pixel(tmp_path / "key.png")[0] == [255, 255, 255]
    got = pixel(picture(tmp_path / "c.jpg", (0, 255, 255, 0), mode="CMYK", quality=100))[0]
    assert got[0] > 245 and max(got[1:]) < 10
    frames = [Image.new("RGB", (8, 8), c) for c in ("red", "blue")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert pixel(tmp_path / "a.gif")[0] == [255, 0, 0]


def test_deep_grey_of_fewer_bits_than_its_file_has(tmp_path, capsys):
    tags = struct.pack("<HHHII", 8, 256, 4, 1, 8) + b"".join(  # of 8 x 1 pixels of 12 bits, all 2048
        struct.pack("<HHII", *tag) for tag in ((257, 4, 1, 1), (258, 3, 1, 12), (259, 3, 1, 1), (262, 3, 1, 1),
                                               (273, 4, 1, 110), (278, 4, 1, 1), (279, 4, 1, 12))) + bytes(4)
    (tmp_path / "x.tif").write_bytes(b"II*\0\x08\0\0\0" + tags + b"\x80\x08\x00" * 4)
    assert abs(pixel(tmp_path / "x.tif")[0][0] - 128) <= 1
    for i in range(4):
        picture(tmp_path / f"dark/{i}.png", 4000, mode="I;16")
        picture(tmp_path / f"light/{i}.png", 40000, mode="I;16")
    for name in ("dark", "light"):
        for _ in range(2):  # packed, and found again
            pictures.pack(pictures.open_source(tmp_path / name), 8, tmp_path / "c")
            assert ("most train pictures are nearly black" in capsys.readouterr().out) == (name == "dark")


def test_a_long_text_in_a_png_is_no_bomb(tmp_path):
    text = PngImagePlugin.PngInfo()
    text.add_text("k", "x" * (2 << 20), zip=True)
    assert pixel(picture(tmp_path / "x.png", pnginfo=text))[0] == [200, 40, 90]
    text = PngImagePlugin.PngInfo()
    text.add_text("k", "x" * (65 << 20), zip=True)
    with pytest.raises(ValueError):
        pictures.decode(picture(tmp_path / "y.png", pnginfo=text), 8)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("ending", ["jpg", "png", "tif"])
def test_exif_orientation(tmp_path, orientation, ending):
    # Four colours in four corners, so that each of the eight turns looks different; large, so that the
    # JPEG is decoded at a fraction.
    image = Image.new("RGB", (320, 160))
    corners = {(0, 0): "red", (160, 0): "lime", (0, 80): "blue", (160, 80): "white"}
    for corner, color in corners.items():
        image.paste(Image.new("RGB", (160, 80), color), corner)
    exif = Image.Exif()
    exif[0x0112] = orientation
    image.save(tmp_path / f"x.{ending}", exif=exif)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from PIL import ImageOps
        upright = ImageOps.exif_transpose(Image.open(tmp_path / f"x.{ending}"))
    pixels, aspect = pictures.decode(tmp_path / f"x.{ending}", 16)
    assert aspect == upright.width / upright.height == (2 if orientation < 5 else 0.5)
    for v in (4, 12):
        for u in (4, 12):
            wanted = torch.tensor(upright.getpixel((u * upright.width // 16, v * upright.height // 16)))
            assert (pixels[:, v, u].int() - wanted).abs().max() < 12


def test_scaled_decoding_is_close_to_decoding_whole(tmp_path):
    ramp = torch.arange(512).float() / 2
    smooth = torch.stack([ramp.expand(512, 512), ramp.expand(512, 512).T, (ramp + ramp[:, None]) / 2])
    image = Image.frombytes("RGB", (512, 512), bytes(smooth.byte().permute(1, 2, 0).flatten().tolist()))
    image.resize((600, 480)).save(tmp_path / "r.jpg", quality=95)
    whole = Image.open(tmp_path / "r.jpg").resize((64, 64), Image.Resampling.BILINEAR)
    whole = torch.tensor(list(whole.tobytes())).view(64, 64, 3).permute(2, 0, 1)
    pixels, aspect = pictures.decode(tmp_path / "r.jpg", 64)
    assert (pixels.int() - whole).abs().float().mean() < 1.5 and aspect == 600 / 480


def test_image_of_the_wanted_size_is_kept_byte_by_byte(tmp_path):
    noise = bytes(torch.randint(256, (32 * 32 * 3,)).tolist())
    Image.frombytes("RGB", (32, 32), noise).save(tmp_path / "n.png")
    assert bytes(pictures.decode(tmp_path / "n.png", 32)[0].permute(1, 2, 0).flatten().tolist()) == noise


# ---- the store ---------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    class_folders(tmp_path / "d", a=20, b=20)
    return tmp_path / "d"


def forbid(monkeypatch):
    def no_decoding(path, size):
        raise AssertionError("decoded although the store is there")

    monkeypatch.setattr(store, "decode", no_decoding)


def test_second_pack_decodes_nothing(folder, tmp_path, monkeypatch):
    first = packed(folder, tmp_path / "c")
    forbid(monkeypatch)
    second = packed(folder, tmp_path / "c")
    for a, b in ((first.train, second.train), (first.val, second.val)):
        assert a.images.equal(b.images) and a.labels.equal(b.labels) and a.aspect.equal(b.aspect)
        assert a.paths == b.paths
    assert first.train.aspect[0] == pytest.approx(Image.open(first.train.paths[0]).width / 30)
    for i, path in enumerate(first.train.paths):  # every row belongs to its path
        assert first.train.images[i, :, 0, 0].tolist() == list(Image.open(path).getpixel((0, 0)))
    with pytest.raises(UsageError):  # another size is another store
        packed(folder, tmp_path / "c", size=17)
    assert not list((tmp_path / "c").glob(".packing-*"))  # and what failed left nothing behind


def test_two_packers_at_once(folder, tmp_path):
    results, meet = [], threading.Barrier(2)

    def work():
        meet.wait()
        results.append(packed(folder, tmp_path / "c"))

    threads = [threading.Thread(target=work) for _ in range(2)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert len(results) == 2 and results[0].train.images.equal(results[1].train.images)
    assert len(list((tmp_path / "c").iterdir())) == 2  # train and val


def test_the_loser_of_a_race_uses_the_winners_store(folder, tmp_path):
    packed(folder, tmp_path / "c")
    final = next((tmp_path / "c").glob("d-train-*"))
    late = tmp_path / "c" / ".packing-late"  # of a second process, about to rename
    late.mkdir()
    (late / "meta.pt").write_text("the loser's")
    assert len(store.publish(late, final)) == 36 and late.exists()


def test_only_the_splits_asked_for_are_read(tmp_path):
    class_folders(tmp_path / "train", a=4)
    (tmp_path / "test/a").mkdir(parents=True)
    (tmp_path / "test/a/broken.png").write_bytes(b"")
    d = packed(tmp_path, tmp_path / "c", splits=("train", "val"))
    assert d.test is None and not list((tmp_path / "c").glob("*-test-*"))
    with pytest.raises(UsageError, match="broken.png"):
        packed(tmp_path, tmp_path / "c", splits=("test",))


def test_unreadable_files_stop_or_are_left_out(folder, tmp_path, capsys, monkeypatch):
    (folder / "a/0.png").write_bytes(b"")
    (folder / "a/1.png").write_text("text")
    buffer = io.BytesIO()
    Image.effect_noise((200, 200), 90).convert("RGB").save(buffer, "JPEG")
    (folder / "b/cut.jpg").write_bytes(buffer.getvalue()[:3000])
    picture(folder / "b/bomb.png", size=(900, 900))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 200_000)
    with pytest.raises(UsageError) as error:
        packed(folder, tmp_path / "c", holdout=0)
    text = line_of(error)
    assert "4 of 42" in text and "empty file" in text and "--skip-unreadable" in text and "1 more" in text
    listing = (tmp_path / "c/d-unreadable.txt").read_text()
    assert f"{folder}/a/1.png\tno image\n" in listing and len(listing.splitlines()) == 4
    for _ in range(2):  # packed, and found again
        source = pictures.open_source(folder, holdout=0)
        train = pictures.pack(source, 16, cache=tmp_path / "c", skip_unreadable=True).train
        assert "left out 4" in capsys.readouterr().out
        assert len(train) == train.images.shape[0] == 38 and train.labels.bincount().tolist() == [18, 20]
        for i, path in enumerate(train.paths):
            assert train.images[i, :, 0, 0].tolist() == list(Image.open(path).getpixel((0, 0)))


def test_a_cache_that_cannot_be_written_is_named(folder, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UsageError, match="--cache"):
        packed(folder, tmp_path / "file/c")
    full = type("usage", (), {"free": 10})
    monkeypatch.setattr(store.shutil, "disk_usage", lambda path: full)
    with pytest.raises(UsageError, match="--cache"):
        packed(folder, tmp_path / "c")
    assert not list((tmp_path / "c").iterdir())


# ---- toy, CIFAR, STL-10 ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    return pictures.pack(pictures.open_source("toy"), 32, cache=tmp_path_factory.mktemp("toy"), quiet=True,
                     splits=("train", "val", "test"))


def test_toy(drawn, tmp_path):
    assert [len(s) for s in (drawn.train, drawn.val, drawn.test)] == [4000, 1000, 1000] and drawn.kind == "toy"
    for split in (drawn.train, drawn.val, drawn.test):
        assert split.labels.bincount().tolist() == [len(split) // 10] * 10
        assert split.images[:, 0].equal(split.images[:, 1]) and split.images[:, 0].equal(split.images[:, 2])
    again = torch.cat(list(toy.draw_toy("val", 32)))
    assert again.equal(drawn.val.images) and not again.equal(drawn.test.images)
    # The same geometry at another size: shrunk, it is the small one but for noise and edges.
    large = torch.nn.functional.avg_pool2d(next(toy.draw_toy("val", 64))[:20].float(), 2)
    assert (large - again[:20].float()).abs().mean() < 12
    # Neither trivial nor hopeless: nearest class mean of the pixels is above chance and far from solving it.
    x, y = drawn.train.images[:, 0].flatten(1).float(), drawn.train.labels
    means = torch.stack([(x[y == c] - x[y == c].mean(1, keepdim=True)).abs().mean(0) for c in range(10)])
    q = drawn.val.images[:, 0].flatten(1).float()
    q = (q - q.mean(1, keepdim=True)).abs()
    accuracy = (torch.cdist(q, means).argmin(1) == drawn.val.labels).float().mean()
    assert 0.12 < accuracy < 0.75, accuracy


def test_real_cifar10_comes_out_byte_by_byte(tmp_path):
    root = ROOT.parent / "shared"
    if not (root / "cifar-10-batches-py").is_dir():
        pytest.skip("no ../shared/cifar-10-batches-py beside the repository")
    from torchvision.datasets import CIFAR10
    d = pictures.pack(pictures.open_source("cifar10", root=root), 32, tmp_path, ("val", "test"), quiet=True)
    truth = CIFAR10(root, train=False)
    assert d.test.images.permute(0, 2, 3, 1).equal(torch.from_numpy(truth.data))
    assert d.test.labels.tolist() == truth.targets and d.classes == truth.classes and d.kind == "cifar"
    assert d.val.labels.bincount().tolist() == [500] * 10 and d.train is None
    truth = CIFAR10(root)
    rows = [int(p.split("/")[-1]) for p in d.val.paths]
    assert d.val.images.permute(0, 2, 3, 1).equal(torch.from_numpy(truth.data[rows]))
    assert pictures.open_source(root / "cifar-10-batches-py").name == "cifar10"


def fake_stl10(root):
    folder = root / "stl10_binary"
    folder.mkdir()
    (folder / "class_names.txt").write_text("\n".join("abcdefghij"))
    for part, count in (("train", 20), ("unlabeled", 5), ("test", 4)):
        pixels = torch.zeros(count, 3, 96, 96, dtype=torch.uint8)
        pixels[:, 0, :48] = torch.arange(count)[:, None, None].byte() + 1  # red in the top half ...
        (folder / f"{part}_X.bin").write_bytes(bytes(pixels.transpose(2, 3).flatten().tolist()))
        if part != "unlabeled":
            (folder / f"{part}_y.bin").write_bytes(bytes([i % 10 + 1 for i in range(count)]))


def test_stl10(tmp_path):
    fake_stl10(tmp_path)
    d = pictures.pack(pictures.open_source("stl10", root=tmp_path), 96, tmp_path / "c", ("train", "val", "test"), True)
    assert (d.kind, len(d.train), len(d.val), len(d.test)) == ("stl10", 15, 10, 4)
    assert (d.train.labels < 0).tolist() == [False] * 10 + [True] * 5
    for split in (d.train, d.val, d.test):
        for i, path in enumerate(split.paths):
            row = int(path.split("/")[-1])
            assert split.images[i, 0, 0, 95] == row + 1 and split.images[i, 0, 95, 0] == 0  # ... not the left
            assert split.labels[i] == (-1 if "unlabeled" in path else row % 10)
    os.truncate(tmp_path / "stl10_binary/train_X.bin", 1000)
    with pytest.raises(UsageError, match="--download"):
        pictures.open_source("stl10", root=tmp_path)


def test_pickles_with_code_are_refused(tmp_path):
    (tmp_path / "cifar-10-batches-py").mkdir()
    (tmp_path / "cifar-10-batches-py/batches.meta").write_bytes(b"cos\nsystem\n(S'touch %s/ran'\ntR." %
                                                                str(tmp_path).encode())
    with pytest.raises(UsageError, match="damaged"):
        pictures.open_source(tmp_path)
    assert not (tmp_path / "ran").exists()


# ---- batches -----------------------------------------------------------------------------------


def split_of(count):
    images = torch.arange(count).view(-1, 1, 1, 1).expand(count, 3, 2, 2).to(torch.uint8).clone()
    return pictures.Split(images, torch.arange(count) % 3 - 1, torch.arange(count).float() + 0.5,
                      [str(i) for i in range(count)])


def indices(batches, epoch=0, start=0):
    out = []
    for images, aspect, labels, index in batches.batches(epoch, start):
        assert images[:, 0, 0, 0].tolist() == index.tolist()  # all four parts speak of the same image
        assert aspect.equal(index + 0.5) and labels.equal(index % 3 - 1)
        out.append(index.tolist())
    return out


@pytest.mark.parametrize("prefetch", [False, True])
def test_an_epoch_shows_every_image_once(prefetch):
    batches = pictures.Batches(split_of(50), 8, drop_last=False)
    batches.hold = lambda: not prefetch
    first = indices(batches)
    assert sorted(sum(first, [])) == list(range(50)) and [len(b) for b in first] == [8] * 6 + [2]
    assert len(batches) == 7 == len(first)
    assert first == indices(batches) != indices(batches, epoch=1)
    assert indices(batches, epoch=1, start=3) == indices(batches, epoch=1)[3:]  # a resume from the middle
    assert indices(batches, start=7) == []
    other, next_epoch = pictures.Batches(split_of(50), 8, seed=1, drop_last=False), indices(batches, epoch=1)
    assert indices(other) != first and indices(other) != next_epoch


def test_streams_of_cuda_are_not_asked_for_elsewhere(monkeypatch):
    def stream(_):
        raise AttributeError("module 'torch.mps' has no attribute 'current_device'")

    monkeypatch.setattr(torch.cuda, "stream", stream)  # as on a Mac
    batches = pictures.Batches(split_of(50), 8)
    batches.hold = lambda: False
    assert len(indices(batches)) == 6


def test_short_batches_are_dropped_in_training_only():
    training, evaluation = pictures.Batches(split_of(50), 8), pictures.Batches(split_of(50), 8, shuffle=False,
                                                                       drop_last=False)
    assert [len(b) for b in indices(training)] == [8] * 6 and len(training) == 6
    assert sum(indices(evaluation), []) == list(range(50))


def test_batch_sizes_that_cannot_work():
    with pytest.raises(UsageError, match="--batch-size 64.* 50 images"):
        pictures.Batches(split_of(50), 64)
    assert [len(b) for b in indices(pictures.Batches(split_of(50), 64, drop_last=False))] == [50]
    with pytest.raises(UsageError, match="--batch-size 10.*multiple of their number, 4: take 8"):
        pictures.Batches(split_of(50), 10, world=4)


def test_the_prefetching_thread_ends_and_its_errors_are_raised(monkeypatch):
    before = threading.active_count()
    batches = pictures.Batches(split_of(200), 4)
    batches.hold = lambda: False
    running = batches.batches(0)
    next(running)
    assert threading.active_count() == before + 1
    running.close()
    assert threading.active_count() == before

    true_select = torch.index_select

    def fail(images, dim, index, out=None):
        if 7 in index:
            raise OSError("the disk is gone")
        return true_select(images, dim, index, out=out)

    monkeypatch.setattr(torch, "index_select", fail)
    with pytest.raises(OSError, match="the disk is gone"):
        list(batches.batches(0))
    assert threading.active_count() == before


def test_images_are_held_where_they_fit(monkeypatch):
    # The meta device stands for an accelerator: what is on it has no bytes, but shape and device.
    split, device = split_of(50), torch.device("meta")
    monkeypatch.setattr("pictures.batches.free_memory", lambda device: split.images.numel() / 0.4 - 10)
    assert not pictures.Batches(split, 8, device).hold() and not split.held
    monkeypatch.setattr("pictures.batches.free_memory", lambda device: split.images.numel() / 0.4 + 10)
    images, aspect, labels, index = next(pictures.Batches(split, 8, device).batches(0))
    assert images.device == labels.device == device and aspect.device.type == index.device.type == "cpu"
    assert images.shape == (8, 3, 2, 2) and split.held[device].shape == split.images.shape


def test_labelled_is_a_view_and_refuses_a_wrong_order():
    split = split_of(6)
    with pytest.raises(ValueError):
        pictures.labelled(split)
    split.labels = torch.tensor([2, 0, 1, -1, -1, -1])
    part = pictures.labelled(split)
    assert len(part) == 3 and part.labels.tolist() == [2, 0, 1] and part.paths == ["0", "1", "2"]
    assert part.images.data_ptr() == split.images.data_ptr()
