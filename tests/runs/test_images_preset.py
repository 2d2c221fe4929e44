"""The preset of one's own images: the network and its size follow from the pictures."""

import numpy as np
import pytest
from PIL import Image

from pecker_fast.diffusion import build_unet
from pecker_fast.runs.presets.images import size_for, unet_for
from pecker_fast.runs.pretrain import PretrainArguments


def write(path, width, height, grey=False):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.randint(256, size=(height, width) if grey else (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


@pytest.mark.parametrize(
    ("shortest", "size"), [(8, 8), (11, 8), (12, 12), (17, 16), (28, 28), (31, 28), (32, 32), (33, 32), (4000, 32)]
)
def test_size_needs_no_enlarging(shortest, size):
    assert size_for(shortest) == size <= shortest
    unet_for(size, 3, 5)


@pytest.mark.parametrize(
    ("size", "levels"),
    [(8, (8, 4)), (12, (12, 6)), (16, (16, 8, 4)), (20, (20, 10, 5)), (28, (28, 14, 7)), (32, (32, 16, 8, 4))],
)
def test_levels_get_down_to_a_few_pixels(size, levels):
    unet = unet_for(size, 1, 3)
    assert unet.resolutions == levels and (unet.in_channels, unet.num_classes) == (1, 3)


def test_largest_network_is_built():
    unet = build_unet(unet_for(64, 3, 2))
    assert unet.config["block_out_channels"] == (24, 48, 96, 128) and unet.config["sample_size"] == 64


@pytest.mark.parametrize(
    ("size", "match"),
    [
        (17, r"sample_size is 17, which cannot be halved .* such as --sample_size 16, or --block_out_channels"),
        (30, r"sample_size is 30, .* --sample_size 32"),
        (4, r"sample_size is 4, .* --sample_size 8"),
        (96, r"sample_size is 96, .* choose a smaller --sample_size, or set --block_out_channels"),
    ],
)
def test_sizes_without_a_network(size, match):
    with pytest.raises(ValueError, match=match):
        unet_for(size, 3, 5)


def test_the_network_follows_from_the_pictures(tmp_path):
    for name in ("a", "b", "c"):
        write(tmp_path / name / "0.png", 40, 21)
    data = f"folder:{tmp_path}"

    def unet(*args, preset="images"):
        return PretrainArguments.defaults(preset, data, *args).unet

    assert (unet().sample_size, unet().in_channels, unet().num_classes) == (20, 3, 3)
    assert (unet(16).sample_size, unet(16, 1).in_channels) == (16, 1)
    # The user's own levels are checked with the other options.
    assert (unet(17, None, True).sample_size, unet(None, None, True).num_classes) == (17, 3)
    # Other presets decide all but the number of classes.
    cifar = unet(preset="cifar10")
    assert (cifar.sample_size, cifar.in_channels, cifar.num_classes, cifar.null_label) == (32, 3, 3, True)
    write(tmp_path / "c" / "1.png", 30, 30, grey=True)
    with pytest.raises(ValueError, match=r"has 1 grey pictures, such as .*c/1\.png, and 3 others.*set --in_channels 3"):
        unet()
    assert unet(None, 1).in_channels == 1
    write(tmp_path / "c" / "2.png", 30, 7)
    with pytest.raises(ValueError, match=r"c/2\.png has a side of 7 pixels, expected at least 8"):
        unet(None, 3)
    assert unet(16, 3).sample_size == 16


def test_grey_pictures_make_a_grey_network(tmp_path):
    for name in ("a", "b"):
        write(tmp_path / name / "0.png", 16, 16, grey=True)
    assert PretrainArguments.defaults("images", f"folder:{tmp_path}").unet.in_channels == 1


def test_a_data_set_is_needed(tmp_path):
    with pytest.raises(
        ValueError, match=r"dataset_name is not given, and the preset images has no data set: expected a"
    ):
        PretrainArguments.defaults("images").check()
    # The options can be shown though there is no such folder.
    assert PretrainArguments.defaults("images", f"folder:{tmp_path}/none").unet.num_classes == 10
