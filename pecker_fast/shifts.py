"""Images shifted by whole pixels."""

import torch
import torch.nn.functional as F
from torch import Tensor


def shifted(images: Tensor, offsets: Tensor, most: int) -> Tensor:
    """Shift each image by its own number of pixels along both axes; what becomes visible at the edges is -1 (black).

    Parameters
    ----------
    images : Tensor
        (N, C, H, W). Is not changed.
    offsets : Tensor
        int64 (2, N) on the images' device, from 0 to 2 * ``most``: along rows and columns, the place of the result in
        the image with ``most`` black pixels added on all sides. At ``most`` an image stays where it is.
    most : int
        Pixels of the largest shift, at least 1.

    Returns
    -------
    Tensor
        The shape and dtype of ``images``.
    """
    n, channels, height, width = images.shape
    device = images.device
    rows, columns = (
        line.view(n, 1) + torch.arange(size, device=device) for line, size in zip(offsets, (height, width), strict=True)
    )
    padded = F.pad(images, (most, most, most, most), value=-1.0)
    index = torch.arange(n, device=device).view(n, 1, 1, 1), torch.arange(channels, device=device).view(1, -1, 1, 1)
    return padded[(*index, rows.view(n, 1, height, 1), columns.view(n, 1, 1, width))]
