"""Ten Meta-World v3 tasks as a policy of the pi0.5 kind sees them: three 128-pixel cameras, hand and gripper, a sentence.

    from servoflow_eval.metaworld import MetaWorldEnv

    env = MetaWorldEnv()
    env.reset("push-v3", 0)                 # evaluation scene 0 of 200
    while not env.done:
        observation = env.observe()         # {"images": {...}, "state": float32[4], "prompt": str}
        env.step(chunk[0])                  # float [4] in [-1, 1]: hand dx, dy, dz in centimetres, gripper effort

Needs `metaworld==3.1.1`, `mujoco==3.3.0`, `gymnasium==1.1.1` (mujoco 3.5 changed collisions: the experts break) and an
OpenGL that renders without a display, EGL where `MUJOCO_GL` does not name another.
"""

from .env import MAX_STEPS, SimulatorError, MetaWorldEnv, Snapshot
from .render import CAMERAS, IMAGE_SIZE
from .scenes import EVALUATION_SCENES, FIRST_TRAINING_SEED, evaluation_vectors, training_vector
from .tasks import FAUCET_PAIR, TASKS, other_faucet, prompts

__all__ = [
    "CAMERAS",
    "EVALUATION_SCENES",
    "SimulatorError",
    "FAUCET_PAIR",
    "FIRST_TRAINING_SEED",
    "IMAGE_SIZE",
    "MAX_STEPS",
    "MetaWorldEnv",
    "Snapshot",
    "TASKS",
    "evaluation_vectors",
    "other_faucet",
    "prompts",
    "training_vector",
]
