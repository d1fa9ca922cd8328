"""Three cameras into one picture buffer: without shadows, reflections and multisampling, 7 ms a frame in software."""

from __future__ import annotations

import atexit
import importlib
import os
import weakref
from collections.abc import Mapping
from typing import Any

import mujoco
import numpy as np
import numpy.typing as npt

IMAGE_SIZE = 128
"""Height and width of every picture in pixels."""


def _free(lookat: tuple[float, float, float], distance: float, azimuth: float, elevation: float) -> Any:
    camera = mujoco.MjvCamera()
    camera.type = mujoco.mjtCamera.mjCAMERA_FREE
    camera.lookat[:] = lookat
    camera.distance, camera.azimuth, camera.elevation = distance, azimuth, elevation
    return camera


# The two free cameras stand close: the object is about twice as large as in the model's own far cameras, and a small
# vision tower finds it to 0.4 cm instead of 0.7 cm.
_FREE: Mapping[str, tuple[tuple[float, float, float], float, float, float]] = {
    "side": ((0.0, 0.65, 0.1), 1.15, 125.0, -35.0),
    "top": ((0.0, 0.65, 0.05), 1.0, 90.0, -89.0),
}
_WRIST = "gripperPOV"

CAMERAS: tuple[str, ...] = ("side", "wrist", "top")
"""The cameras in the order of the policy's slots: base, left wrist, right wrist."""


_shared_gl: dict[int, Any] = {}
_renderers: weakref.WeakSet[Renderer] = weakref.WeakSet()


def _open_gl(width: int, height: int) -> Any:
    """This process's OpenGL context, of the kind that MUJOCO_GL names, without a display where it is unset.

    One for all renderers: on a GPU each costs 100 MB. Not mujoco.GLContext: that one was chosen when mujoco was first
    imported, maybe before this package.
    """
    process = os.getpid()
    if process in _shared_gl:
        return _shared_gl[process]
    kind = os.environ.get("MUJOCO_GL", "egl").lower().strip() or "egl"
    try:
        if kind not in ("egl", "osmesa", "glfw"):
            raise ValueError('expected "egl", "osmesa" or "glfw"')
        context = importlib.import_module(f"mujoco.{kind}").GLContext(width, height)
    except Exception as error:
        raise RuntimeError(
            f"no OpenGL context with MUJOCO_GL={kind}: {error}. To render without a display on Debian: "
            "apt-get install libegl1 libegl-mesa0 libgl1-mesa-dri, and MUJOCO_GL=egl"
        ) from error
    _shared_gl[process] = context
    atexit.register(_close_gl, process)  # before EGL itself ends, whose hook is older
    return context


def _close_gl(process: int) -> None:
    if process == os.getpid() and process in _shared_gl:
        for renderer in list(_renderers):
            renderer.close()
        _shared_gl.pop(process).free()


class Renderer:
    """Draws one model's scenes. Belongs to the process and the thread that made it; `close` it there."""

    def __init__(self, model: Any) -> None:
        model.vis.quality.shadowsize = 0
        model.vis.quality.offsamples = 0
        self._model = model
        width = IMAGE_SIZE * len(CAMERAS)
        self._gl = _open_gl(width, IMAGE_SIZE)
        self._gl.make_current()
        self._context = mujoco.MjrContext(model, mujoco.mjtFontScale.mjFONTSCALE_150.value)
        mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN.value, self._context)
        self._context.readDepthMap = mujoco.mjtDepthMap.mjDEPTH_ZERONEAR
        self._scene = mujoco.MjvScene(model, maxgeom=2000)
        self._options = mujoco.MjvOption()
        self._perturb = mujoco.MjvPerturb()
        self._cameras = [self._camera(name) for name in CAMERAS]
        self._area = mujoco.MjrRect(0, 0, width, IMAGE_SIZE)
        self._areas = [mujoco.MjrRect(IMAGE_SIZE * k, 0, IMAGE_SIZE, IMAGE_SIZE) for k in range(len(CAMERAS))]
        self._pixels = np.empty((IMAGE_SIZE, width, 3), np.uint8)
        _renderers.add(self)

    def _camera(self, name: str) -> Any:
        if name in _FREE:
            return _free(*_FREE[name])
        camera = mujoco.MjvCamera()
        camera.type = mujoco.mjtCamera.mjCAMERA_FIXED
        camera.fixedcamid = mujoco.mj_name2id(self._model, mujoco.mjtObj.mjOBJ_CAMERA, _WRIST)
        if camera.fixedcamid < 0:
            raise ValueError(f"the model has no camera {_WRIST!r}")
        return camera

    def draw(self, data: Any, out: npt.NDArray[np.uint8] | None = None) -> npt.NDArray[np.uint8]:
        """uint8 [cameras, height, width, 3], top row first, written into `out` where given."""
        self._gl.make_current()
        # MuJoCo binds its buffer at the end of a drawing, so after another context was current the first camera's frame
        # would go elsewhere, and a picture of the past would be read.
        mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN.value, self._context)
        for camera, area in zip(self._cameras, self._areas):
            mujoco.mjv_updateScene(
                self._model,
                data,
                self._options,
                self._perturb,
                camera,
                mujoco.mjtCatBit.mjCAT_ALL.value,
                self._scene,
            )
            self._scene.flags[mujoco.mjtRndFlag.mjRND_SHADOW] = 0
            self._scene.flags[mujoco.mjtRndFlag.mjRND_REFLECTION] = 0
            mujoco.mjr_render(area, self._scene, self._context)
        mujoco.mjr_readPixels(self._pixels, None, self._area, self._context)
        if out is None:
            out = np.empty((len(CAMERAS), IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8)
        rows = self._pixels[::-1]
        for k in range(len(CAMERAS)):
            out[k] = rows[:, IMAGE_SIZE * k : IMAGE_SIZE * (k + 1)]
        return out

    def close(self) -> None:
        """Gives the OpenGL objects back."""
        if self._context is not None:
            self._gl.make_current()
            self._context.free()
            self._context = None
