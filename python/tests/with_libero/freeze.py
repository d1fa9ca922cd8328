"""Writes frozen.json: where the scripted actions lead, on this machine with these versions.

    build/release-libero/venv/bin/python python/tests/with_libero/freeze.py

Only where a version in simulator.py changes: figures taken before are of another simulator then.
"""

import hashlib
import json

from conftest import FROZEN, STEPS, machine, play, seen, thumbnail

from servoflow_eval.libero import LiberoSimulator, protocol

CASES = (
    ("libero_goal", "put_the_bowl_on_the_plate", 3),
    (
        "libero_spatial",
        "pick_up_the_black_bowl_in_the_top_drawer_of_the_wooden_cabinet_and_place_it_on_the_plate",
        0,
    ),
    ("libero_object", "pick_up_the_milk_and_place_it_in_the_basket", 49),
)


def main() -> None:
    cases, renderer = [], ""
    for suite, task, episode in CASES:
        simulator = LiberoSimulator(suite)
        play(simulator, task, episode)
        parts = seen(simulator)
        renderer = simulator.renderer()
        cases.append(
            {
                "suite": suite,
                "task": task,
                "episode": episode,
                "steps": STEPS,
                "sha256": {key: hashlib.sha256(value).hexdigest() for key, value in parts.items()},
                "state": simulator.state().tolist(),
                "thumbnails": {
                    key: thumbnail(simulator.frame(key)).round(2).tolist() for key in protocol.CAMERAS
                },
            }
        )
        simulator.close()
    FROZEN.write_text(json.dumps({"machine": machine(), "renderer": renderer, "cases": cases}) + "\n")
    print(f"Written: {FROZEN}")


if __name__ == "__main__":
    main()
