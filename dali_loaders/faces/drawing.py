"""Draws the face that Traits describe under given Conditions, part by part, from the back to the front.
Coordinates and lengths are those of Traits."""

from __future__ import annotations

import math

import cv2
import numpy as np

from dali_loaders.faces.canvas import ON_HEAD, Canvas
from dali_loaders.faces.traits import Colour, Conditions, Traits

SUPERSAMPLING = 2
DARK = np.array([38.0, 24.0, 24.0])
THROAT = np.array([88.0, 24.0, 24.0])
WHITE = np.array([246.0, 244.0, 240.0])
CIRCLE = np.stack([np.cos(np.arange(14) * math.pi / 7), np.sin(np.arange(14) * math.pi / 7)], axis=1)


def mix(first: Colour, second: Colour, share: float) -> Colour:
    """`first` with a `share` of `second`."""
    return first + share * (second - first)


def ellipse(x: float, y: float, width: float, height: float, tilt: float = 0.0) -> np.ndarray:
    """Points [14, 2] of an ellipse with half axes `width` and `height`, turned by `tilt` radians."""
    return np.add(turned(CIRCLE * (width, height), tilt), (x, y))


def turned(points_N2: np.ndarray, angle: float) -> np.ndarray:
    cosine, sine = math.cos(angle), math.sin(angle)
    return points_N2 @ np.array([[cosine, sine], [-sine, cosine]])


def draw_face(traits: Traits, image: Conditions, size: int) -> np.ndarray:
    """The face without light and camera effects, uint8 RGB [size, size, 3]."""
    canvas = Canvas()
    shadow = mix(traits.skin, np.array([110.0, 40.0, 40.0]), 0.22) * (1 - image.shade)
    draw_back_hair(canvas, traits, image)
    draw_shoulders(canvas, traits, image, shadow)
    draw_head(canvas, traits, image, shadow)
    draw_marks(canvas, traits, shadow)
    draw_facial_hair(canvas, traits, image)
    draw_mouth(canvas, traits, image, shadow)
    draw_nose(canvas, traits, shadow)
    draw_eyes(canvas, traits, image, shadow)
    draw_front_hair(canvas, traits, image)
    draw_brows(canvas, traits, image)
    draw_occlusion(canvas, traits, image)
    pixels = background(image, size * SUPERSAMPLING)
    canvas.render(pixels, image)
    return cv2.resize(pixels, (size, size), interpolation=cv2.INTER_AREA)


def background(image: Conditions, side: int) -> np.ndarray:
    corners = np.array([[image.background, image.background_end], [image.background, image.background_end]])
    pixels = cv2.resize(corners.astype(np.uint8), (side, side), interpolation=cv2.INTER_LINEAR)
    for x, y, width, height, angle, *colour in image.clutter:
        points = ellipse(1 + x, 1 + y, width, height, angle)[::3]
        cv2.fillPoly(pixels, [np.rint(points * side / 2).astype(np.int32)], colour)
    return pixels


def outline(traits: Traits) -> np.ndarray:
    """The head's contour, [14, 2], clockwise from the top."""
    upper = [[0.42, -1.16], [traits.temple_width * 0.92, -0.72], [mean(traits.temple_width, traits.cheek_width), -0.3]]
    lower = [[traits.cheek_width, 0.12], [traits.jaw_width, traits.jaw_height], [traits.chin_width, traits.chin - 0.05]]
    right = np.array(upper + lower)
    left = right[::-1] * (-1, 1)
    return np.concatenate([[[0, -1.25]], right, [[0, traits.chin]], left])


def mean(first: float, second: float) -> float:
    return (first + second) / 2


def draw_shoulders(canvas: Canvas, traits: Traits, image: Conditions, shadow: Colour) -> None:
    neck = traits.jaw_width * 0.72
    canvas.fill(np.array([[-neck, 0.4], [neck, 0.4], [neck, 1.75], [-neck, 1.75]]), shadow * 0.94, depth=-0.3, smooth=False)
    right = np.array([[neck + 0.1, 1.5], [1.5, 1.75], [2.1, 2.4], [2.1, 4]])
    canvas.fill(np.concatenate([[[0, 1.72]], right, right[::-1] * (-1, 1)]), image.clothes, depth=-0.3)


def draw_ear(canvas: Canvas, traits: Traits, side: int, skin: Colour, shadow: Colour) -> None:
    x, size = side * traits.cheek_width * 1.0, traits.ear_size
    canvas.fill(ellipse(x, 0.1, size * 0.62, size, side * traits.ear_tilt * 2), mix(skin, shadow, 0.5), depth=-0.02)
    canvas.fill(ellipse(x + side * 0.04, 0.09, size * 0.3, size * 0.6, side * traits.ear_tilt * 2), shadow, depth=-0.02)


def draw_head(canvas: Canvas, traits: Traits, image: Conditions, shadow: Colour) -> None:
    contour = outline(traits)
    for side in (-1, 1):
        draw_ear(canvas, traits, side, traits.skin, shadow)
    canvas.fill(contour, mix(traits.skin, shadow, 0.55), depth=0.2)
    lit = contour * 0.94 + (0.055 * image.sun_x, 0.03 * image.sun_y)
    canvas.fill(lit, traits.skin, depth=0.2)
    if abs(image.yaw) > 8:  # the near ear shows in front of the head
        draw_ear(canvas, traits, -1 if image.yaw > 0 else 1, traits.skin, shadow)
    blush = mix(traits.skin, np.array([226.0, 84.0, 84.0]), traits.blush)
    for side in (-1, 1):
        canvas.fill(ellipse(side * traits.cheek_width * 0.58, 0.34, 0.19, 0.13), blush)


def draw_marks(canvas: Canvas, traits: Traits, shadow: Colour) -> None:
    freckle = mix(traits.skin, np.array([120.0, 60.0, 30.0]), 0.4)
    for place in traits.freckles:
        canvas.stroke(place[None], freckle, 0.035)
    for x, y, radius in traits.moles:
        canvas.stroke(np.array([[x, y]]), traits.skin * 0.4, 2 * radius)
    if traits.scar:
        x = traits.scar
        canvas.stroke(np.array([[x, 0.2], [x + 0.05, 0.35], [x + 0.14, 0.5]]), mix(traits.skin, WHITE, 0.5), 0.03)
    if traits.folds:
        line = mix(traits.skin, shadow * 0.7, traits.folds * 2)
        for side in (-1, 1):
            canvas.stroke(np.array([[side * 0.26, 0.42], [side * 0.42, 0.58], [side * 0.46, 0.76]]), line, 0.03)
        canvas.stroke(np.array([[-0.3, -0.52], [0, -0.56], [0.3, -0.52]]), line, 0.025)
        canvas.stroke(np.array([[-0.25, -0.64], [0, -0.67], [0.25, -0.64]]), line, 0.025)


def draw_eyes(canvas: Canvas, traits: Traits, image: Conditions, shadow: Colour) -> None:
    steps = np.linspace(-1, 1, 9)
    opening = traits.eye_opening * (1 - image.blink) * image.eye_open
    for side in (-1, 1):
        centre = np.array([side * traits.eye_gap, traits.eye_height])
        tilt = -side * traits.eye_tilt
        peak = np.clip(1 - steps**2, 0, 1) ** 0.7 * (1 + side * traits.eye_peak * steps)
        upper = np.stack([steps * traits.eye_width, -opening * peak], axis=1)
        lower = np.stack([steps * traits.eye_width, opening * traits.lower_lid * (1 - steps**2)], axis=1)

        def place(points: np.ndarray, tilt: float = tilt, centre: np.ndarray = centre) -> np.ndarray:
            return turned(points, tilt) + centre

        if traits.eye_bag:
            canvas.fill(place(ellipse(0, opening * 0.7, traits.eye_width, 0.09)), mix(traits.skin, shadow, traits.eye_bag * 3))
        canvas.stroke(place(upper - (0, traits.lid_fold + 0.03)), shadow * 0.92, 0.02)
        canvas.fill(place(np.concatenate([upper, lower[-2:0:-1]])), mix(WHITE, traits.skin, 0.1), smooth=False)
        for radius, colour in ((1.0, traits.iris * 0.6), (0.82, traits.iris), (0.42, DARK)):
            ring = CIRCLE * (traits.iris_size * radius) + (image.gaze_x, image.gaze_y - 0.01)
            lids = np.interp(ring[:, 0], *upper.T), np.interp(ring[:, 0], *lower.T)
            ring[:, 1] = np.clip(ring[:, 1], *lids)
            canvas.fill(place(ring), colour, smooth=False)
        if opening > 0.05:
            canvas.stroke(place(np.array([[image.gaze_x + 0.03, image.gaze_y - 0.04]])), WHITE, 0.045)
        canvas.stroke(place(upper), mix(DARK, traits.skin, 0.1), traits.lash)
        canvas.stroke(place(lower), mix(shadow, DARK, 0.25), 0.016)


def draw_brows(canvas: Canvas, traits: Traits, image: Conditions) -> None:
    colour = mix(traits.skin, traits.hair * 0.6, traits.brow_darkness)
    steps = np.linspace(-1, 1, 5)
    for side in (-1, 1):
        arch = -traits.brow_arch * (1 - steps**2) * 1.4
        thickness = traits.brow_thickness * np.interp(side * steps, [-1, 0, 1], [1, 0.95, traits.brow_taper * 0.6])
        upper = np.stack([steps * traits.brow_length, arch - thickness / 2], axis=1)
        lower = np.stack([steps * traits.brow_length, arch + thickness / 2], axis=1)
        brow = turned(np.concatenate([upper, lower[::-1]]), side * (traits.brow_tilt + image.brow_frown))
        height = traits.eye_height - traits.brow_gap - image.brow_raise
        canvas.fill(np.add(brow, (side * (traits.eye_gap + 0.02), height)), colour, lift=0.03)


def draw_nose(canvas: Canvas, traits: Traits, shadow: Colour) -> None:
    top, tip = traits.eye_height + 0.04, traits.eye_height + traits.nose_length
    bridge, bulb, width = traits.nose_bridge, traits.nose_bulb, traits.nose_width
    low = tip + bulb + traits.nose_turn
    light = mix(traits.skin, WHITE, 0.14)
    line = mix(traits.skin, shadow, 0.9)
    for side in (-1, 1):
        canvas.fill(ellipse(side * width * 0.72, tip - 0.01, width * 0.36, bulb * 0.72), mix(traits.skin, shadow, 0.6), lift=0.1)
    right = np.array([[bridge, top], [bridge * 1.2, tip - 0.15], [width * 0.62, tip]])
    ridge = np.concatenate([right, [[0, low - bulb * 0.25]], right[::-1] * (-1, 1)])
    canvas.fill(ridge, mix(traits.skin, shadow, 0.28), lift=0.2)
    canvas.fill(ellipse(0, tip - bulb * 0.25, bulb * 0.75, bulb * 0.7), light, lift=0.26)
    for side in (-1, 1):
        nostril = ellipse(side * width * 0.45, low - bulb * 0.5, traits.nostril * 1.3, traits.nostril * 0.8)
        canvas.fill(nostril, shadow * 0.5, lift=0.16)
    under = np.array([[-width * 0.8, tip + bulb * 0.35], [0, low], [width * 0.8, tip + bulb * 0.35]])
    canvas.stroke(under, line * 0.85, 0.022, lift=0.14)


def mouth_height(traits: Traits) -> float:
    return traits.eye_height + traits.nose_length + traits.mouth_drop


def draw_mouth(canvas: Canvas, traits: Traits, image: Conditions, shadow: Colour) -> None:
    smile = traits.habitual_smile + image.smile
    half = traits.mouth_width * (1 + smile)
    y, gap = mouth_height(traits), image.mouth_open
    steps = np.linspace(-1, 1, 7)
    bend = (1 - steps**2) * smile  # corners of a smile stay up, the middle goes down
    swell = 1 - np.abs(steps) ** 1.6
    bow = 1 - traits.cupid_bow * (np.abs(steps) < 0.1)
    middle_up = np.stack([steps * half, y + bend - smile / 2 - gap * 0.25 * swell], axis=1)
    middle_down = middle_up + np.stack([0 * steps, gap * swell], axis=1)
    top = middle_up - np.stack([0 * steps, traits.upper_lip * swell * bow], axis=1)
    bottom = middle_down + np.stack([0 * steps, traits.lower_lip * swell], axis=1)
    lip = mix(mix(traits.skin, shadow, 0.5), np.array([186.0, 48.0, 62.0]), traits.lip_redness)
    if not traits.beard:
        canvas.fill(ellipse(0, y + traits.lower_lip + gap + 0.1, half * 0.5, 0.05), mix(traits.skin, shadow, 0.5))
    canvas.fill(np.concatenate([top, bottom[-2:0:-1]]), lip, lift=0.06)
    if gap:
        canvas.fill(np.concatenate([middle_up, middle_down[-2:0:-1]]), THROAT, lift=0.05)
        teeth = middle_up + np.stack([0 * steps, np.minimum(gap * 0.5, 0.07) * swell], axis=1)
        canvas.fill(np.concatenate([middle_up, teeth[-2:0:-1]]), WHITE, lift=0.05)
    else:
        canvas.stroke(middle_up, lip * 0.5, 0.025, lift=0.06)


def draw_facial_hair(canvas: Canvas, traits: Traits, image: Conditions) -> None:
    y = mouth_height(traits)
    colour = traits.hair * 0.85
    if traits.beard:
        jaw, deep = traits.jaw_width, traits.beard_depth
        right = np.array([[traits.cheek_width * 0.97, 0.2], [jaw * 1.02, traits.jaw_height], [traits.chin_width, traits.chin + 0.06]])
        inner = np.array([[0, y + 0.14 - deep * 0.1], [-0.27, y + 0.09], [-jaw * 0.64, y - deep * 0.5], [-traits.cheek_width * 0.84, 0.2]])
        shape = np.concatenate([right, [[0, traits.chin + 0.1]], right[::-1] * (-1, 1), inner[::-1], inner[1:] * (-1, 1)])
        canvas.fill(shape, mix(traits.skin, colour, traits.beard), depth=0.15)
    if traits.moustache:
        wide, high = traits.mouth_width * traits.moustache_width, traits.moustache_height
        low = y - traits.upper_lip * 0.4 - image.smile / 2
        right = np.array([[wide * 0.5, low - high], [wide, low + 0.05], [wide * 0.5, low]])
        shape = np.concatenate([[[0, low - high * 0.8]], right, [[0, low - 0.02]], right[::-1] * (-1, 1)])
        canvas.fill(shape, mix(traits.skin, colour, traits.moustache), lift=0.07)


def draw_back_hair(canvas: Canvas, traits: Traits, image: Conditions) -> None:
    if traits.bald or not traits.hair_length:
        return
    wide = traits.temple_width + 0.12 + traits.side_volume * image.hair_lift
    y = np.linspace(-0.9, traits.hair_length, 7)
    wave = traits.curl * np.sin(traits.curls * y * 0.8 + image.hair_phase)
    right = np.stack([wide * np.interp(y, [-0.9, -0.3, 2], [0.75, 1, 1.08]) + wave, y], axis=1)
    left = np.stack([-wide * np.interp(y, [-0.9, -0.3, 2], [0.75, 1, 1.08]) + wave, y], axis=1)
    canvas.fill(np.concatenate([[[0, -1.3 - traits.hair_volume * 0.8]], right, left[::-1]]), traits.hair * 0.72, depth=-0.25)


def draw_front_hair(canvas: Canvas, traits: Traits, image: Conditions) -> None:
    if traits.bald:
        return
    x = np.linspace(-0.96, 0.96, 15)
    parting = traits.parting + image.hair_shift
    line = -traits.hairline + traits.hairline_curve * x**2 - traits.parting_depth * np.exp(-(((x - parting) / 0.18) ** 2))
    if traits.fringe:
        line += traits.fringe * (1 - 0.6 * x**2) + traits.fringe_slant * traits.fringe * x
    line += traits.curl * 0.6 * np.sin(traits.curls * x * 1.5 + image.hair_phase)
    line = np.minimum(line, traits.eye_height - 0.1)
    inner = np.stack([x * traits.temple_width, line], axis=1)
    end = traits.sideburn * 0.6 - 0.02
    volume, side = traits.hair_volume * image.hair_lift, traits.side_volume * image.hair_lift
    angle = np.linspace(math.pi, 2 * math.pi, 11)
    ripple = 1 + traits.curl * 0.8 * np.sin(traits.curls * 1.6 * angle + image.hair_phase)
    reach = np.stack([np.cos(angle), np.sin(angle)], axis=1) * (traits.temple_width + 0.08 + side, 0.98 + volume) * ripple[:, None]
    reach[:, 1] -= 0.3
    width = mean(traits.temple_width, traits.cheek_width)
    left, right = [[-width * 0.9, end], [-width - 0.05, end]], [[width + 0.05, end], [width * 0.9, end]]
    shape = np.concatenate([left, reach, right, inner[::-1]])
    depths = np.repeat([0.05, -0.1, 0.05, ON_HEAD], [2, len(reach), 2, len(inner)])
    canvas.fill(shape, traits.hair, depth=depths, lift=0.04)
    for place, shade in ((-0.55, 1.1), (-0.2, 0.84), (0.25, 1.1), (0.55, 0.84)):  # a few locks, combed away from the parting
        start = np.array([parting, -(0.95 + volume * 0.5) * math.sqrt(1 - 0.8 * parting**2)])
        finish = np.array([place * 1.3, -traits.hairline - 0.02 + 0.3 * place**2])
        bend = (start + finish) / 2 + (place * 0.2, -0.06 + traits.curl * math.sin(image.hair_phase + 9 * place))
        canvas.stroke(np.array([start, bend, finish]), traits.hair * shade + (shade - 0.8) * 20, 0.025, depth=0.3)


def draw_occlusion(canvas: Canvas, traits: Traits, image: Conditions) -> None:
    if image.glasses:
        frame = image.accessory * 0.5
        for side in (-1, 1):
            rim = ellipse(side * traits.eye_gap, traits.eye_height + 0.03, min(image.glasses, traits.eye_gap - 0.05), image.glasses * 0.82)
            if image.sunglasses:
                canvas.fill(rim, frame, lift=0.12)
            canvas.stroke(np.concatenate([rim, rim[:1]]), frame, 0.04, lift=0.12)
            arm = np.array([[traits.eye_gap + image.glasses, traits.eye_height], [traits.cheek_width, traits.eye_height - 0.02]])
            canvas.stroke(arm * (side, 1), frame, 0.04, lift=0.02)
        canvas.stroke(np.array([[-0.08, traits.eye_height], [0.08, traits.eye_height]]), frame, 0.04, lift=0.18)
    if image.hat:
        brim, crown = -image.hat, traits.hair_volume * 0.5
        wide = traits.temple_width + 0.16
        dome = [[-wide, brim], [-wide * 0.92, -1.1 - crown], [0, -1.5 - crown], [wide * 0.92, -1.1 - crown], [wide, brim], [0, brim + 0.06]]
        canvas.fill(np.array(dome), image.accessory, depth=0.1)
        canvas.stroke(np.array([[-wide - 0.06, brim], [0, brim + 0.08], [wide + 0.06, brim]]), image.accessory * 0.6, 0.14, depth=0.3)
    if image.scarf:
        y = image.scarf
        cloth = np.array([[-1.2, y - 0.06], [0, y + 0.04], [1.2, y - 0.06], [1.4, 1.9], [0, 2.1], [-1.4, 1.9]])
        canvas.fill(cloth, image.accessory, depth=0.25)
        for fold in (0.25, 0.5):
            canvas.stroke(np.array([[-1.1, y + fold], [0, y + fold + 0.12], [1.1, y + fold]]), image.accessory * 0.75, 0.04, depth=0.25)
    if image.hand:
        x, side = image.hand * 0.7, 1 if image.hand > 0 else -1
        for finger in range(4):  # fingers rise from below, side by side
            tip = np.array([x + 0.19 * finger * side, 0.5 - 0.12 * math.sin(finger)])
            finger_line = tip + np.array([[0, 0], [0.12 * side, 0.6], [0.3 * side, 1.4]])
            canvas.stroke(finger_line, traits.skin * (0.92 - 0.04 * (finger % 2)), 0.2, depth=0.9)
