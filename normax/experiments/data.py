"""Images to train on: scikit-learn's digits, or MNIST and CIFAR-10 through OpenML's cache."""

import http.client
import pathlib
import warnings
import zlib
from typing import Any, NamedTuple

import numpy as np

# name on OpenML, version, shape of an image as it comes, number of training images
OPENML = {
    "mnist": ("mnist_784", 1, (28, 28, 1), 60_000),
    "cifar10": ("CIFAR_10", 1, (3, 32, 32), 50_000),
}
NAMES = ("digits", *OPENML)


class UsageError(Exception):
    """Something that whoever gave the command can mend; the message says how."""


class Images(NamedTuple):
    """Images in [0, 1] of shape (number, height, width, channels), and their labels."""

    image: np.ndarray
    label: np.ndarray


def load(name: str, seed: int, home: str | None = None, size: int = 28) -> tuple[Images, Images]:
    """Returns training and test images; the same seed gives the same split of the digits.

    Args:
      name: one of `NAMES`.
      seed: of the split of the digits; the others come with theirs.
      home: folder of scikit-learn's cache.
      size: height and width of the digits, which are shipped as 8x8; the others keep theirs.
    """
    return _digits(seed, size) if name == "digits" else _openml(name, home)


def _digits(seed, size):
    """The 1,797 handwritten digits that scikit-learn ships, resized from 8x8."""
    from scipy import ndimage
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits: Any = load_digits()
    factor = size / 8  # of 1 leaves every pixel as it is
    image: Any = ndimage.zoom(digits.images / 16, (1, factor, factor), order=1)[..., None]
    split: Any = train_test_split(
        image.astype(np.float32),
        digits.target.astype(np.int32),
        test_size=0.2,
        stratify=digits.target,
        random_state=seed,
    )
    train_x, test_x, train_y, test_y = split
    return Images(train_x, train_y), Images(test_x, test_y)


def _openml(name, home):
    from sklearn.datasets import fetch_openml

    title, version, shape, train = OPENML[name]
    if home is not None and pathlib.Path(home).exists() and not pathlib.Path(home).is_dir():
        raise UsageError(f"--data-home {home} is no folder")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of each retry; the error says it all
            # All columns, labels too, as float32: scikit-learn 1.9 cannot read numbers as
            # categories with pandas 3.1, and CIFAR-10 as int64 is 1.5 GB.
            table: Any = fetch_openml(
                title,
                version=version,
                as_frame=False,
                data_home=home,
                n_retries=1,
                read_csv_kwargs={"dtype": np.float32},
            )
    except ImportError as error:
        raise UsageError(f'{name} needs pandas: pip install "normax[experiments]"') from error
    except PermissionError as error:
        raise UsageError(
            f"the cache of {name} cannot be used ({error}); see --data-home"
        ) from error
    except (OSError, EOFError, http.client.HTTPException) as error:  # URLError is an OSError
        raise UsageError(
            f"{name} is not in the cache and openml.org cannot be reached ({error}); run once "
            "with a network, or use --dataset digits, which needs none"
        ) from error
    except (ValueError, KeyError, zlib.error) as error:  # an unknown, truncated or altered data set
        raise UsageError(f"{name} as openml.org gave it cannot be read ({error})") from error
    image = np.array(table.data, np.float32).reshape(-1, *shape)
    image /= 255  # in place: CIFAR-10 is 700 MB
    if shape[0] == 3:
        image = np.moveaxis(image, 1, -1)
    label = np.asarray(table.target).astype(np.int32)
    return Images(image[:train], label[:train]), Images(image[train:], label[train:])
