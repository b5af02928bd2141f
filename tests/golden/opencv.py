"""Write `opencv.json`: what OpenCV makes of a small picture, for the operations of RandAugment.

Run `python opencv.py > opencv.json` with opencv-python-headless 5.0.0 and numpy 2.4.6; neither is needed by the tests.
The calls are those of ALBEF's OpenCV variant of RandAugment at magnitude 7, whose values beyond 0 and 255 are cut here.
"""

import json

import cv2
import numpy as np

GREY = (128, 128, 128)
IMAGE = np.random.default_rng(0).integers(0, 256, (9, 12, 3), dtype=np.uint8)


def warp(matrix):
    height, width = IMAGE.shape[:2]
    return cv2.warpAffine(IMAGE, np.float32(matrix), (width, height), borderValue=GREY, flags=cv2.INTER_LINEAR)


def sharpen(factor):
    kernel = np.ones((3, 3), dtype=np.float32)
    kernel[1, 1] = 5
    smooth = cv2.filter2D(IMAGE, -1, kernel / 13).astype(np.float32)
    changed = IMAGE.astype(np.float32)
    changed[1:-1, 1:-1] = (smooth + factor * (changed - smooth))[1:-1, 1:-1]
    return changed.clip(0, 255).astype(np.uint8)


results = {}
for sign in (1, -1):
    shear, pixels, degrees = sign * 0.21, sign * 7, sign * 21
    middle = (IMAGE.shape[1] / 2, IMAGE.shape[0] / 2)
    results[f"shear_x {shear}"] = warp([[1, shear, 0], [0, 1, 0]])
    results[f"shear_y {shear}"] = warp([[1, 0, 0], [shear, 1, 0]])
    results[f"translate_x {pixels}"] = warp([[1, 0, -pixels], [0, 1, 0]])
    results[f"translate_y {pixels}"] = warp([[1, 0, 0], [0, 1, -pixels]])
    results[f"rotate {degrees}"] = warp(cv2.getRotationMatrix2D(middle, degrees, 1))
results["sharpness 1.36"] = sharpen(1.36)
results["brightness 1.36"] = (np.arange(256, dtype=np.float32) * 1.36).clip(0, 255).astype(np.uint8)[IMAGE]

pixels = {name: image.tolist() for name, image in {"image": IMAGE, **results}.items()}
print(json.dumps(pixels, separators=(",", ":")))
