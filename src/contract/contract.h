// A robot's contract as data: which cameras, state, prompt and statistics a checkpoint was trained with, and
// what to do with its actions. Nothing here is code per robot: a contract is read from robots/*.toml plus
// norm_stats.json, from a lerobot directory's processors, or from a checkpoint's own contract.json; it is
// validated, hashed and printed.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "core/json.h"
#include "servoflow/status.h"

namespace servoflow::contract {

// How a frame becomes the square picture the vision tower sees. All keep the aspect ratio.
enum class Resize {
  kPillow,        // uint8, antialiased bilinear as Pillow computes it, black borders, odd pixel below/right
                  // (openpi)
  kOpenpiFloat,   // float, no antialiasing, clipped to [-1, 1], padded with -1 (openpi's in-model variant)
  kLerobotFloat,  // float [0, 1], no antialiasing, padded with 0 before x2-1, odd pixel below/right (lerobot)
};

enum class NormKind { kIdentity, kQuantile, kMeanStd };

// Where a statistic's epsilon goes, and in which precision the arithmetic runs.
enum class NormStyle {
  kOpenpi,   // float64; quantile gap q99-q01+1e-6; std+1e-6 both ways
  kLerobot,  // float32; quantile gap q99-q01, 1e-8 where that is 0; std+1e-8 forward, plain std backward
};

struct Statistics {
  std::vector<double> mean, std, q01, q99;  // each empty or as long as the feature is wide
};

struct Normalization {
  NormKind kind = NormKind::kQuantile;
  NormStyle style = NormStyle::kOpenpi;
  Statistics stats;
};

struct CameraSlot {
  std::string slot;  // the model's name: "base_0_rgb", "observation.images.top"
  std::string key;   // the request key; empty: the slot is always masked
  bool required = false;
};

struct StatePart {
  std::string key;
  int width = 0;
};

enum class PromptMode {
  kPlain,  // encode(prompt) with BOS, then encode("\n"): pi05_libero
  kState,  // "Task: …, State: …;\nAction: " with BOS, the state binned into 256 levels
};

struct Prompt {
  std::string key = "prompt";
  PromptMode mode = PromptMode::kState;
  int max_tokens = 200;
  std::optional<std::string> default_prompt;
  // A literal "<bos>", "<eos>", "<pad>" or "<unk>" in a prompt becomes that token, as transformers'
  // tokenizers do (lerobot). SentencePiece itself spells them out as text (openpi).
  bool special_literals = false;
};

// One named operation on a state or action vector. The registry (transforms.h) knows the names and their
// arguments.
struct Transform {
  std::string name;            // "delta", "joint_flip", "gripper", …
  std::vector<double> values;  // indices or factors, by operation
  std::string variant;         // for "gripper": "aloha"
};

struct Actions {
  int width = 0;                      // columns handed to the robot; 0: all of the model's
  std::vector<Transform> transforms;  // applied in order to un-normalised actions
  // Labels for people, column by column ("x", "gripper") and what a value of 1 stands for ("m", "rad"; "1"
  // for a plain number). Each empty or `width` long. They change no number and are not in the contract's
  // hash.
  std::vector<std::string> names, units;
};

struct Contract {
  std::string name;   // "libero"
  std::string asset;  // statistics folder under assets/
  Resize resize = Resize::kPillow;
  std::vector<CameraSlot> cameras;          // in the model's order
  std::vector<std::string> ignored_images;  // request keys that are accepted and unused (ALOHA's cam_low)
  bool present_cameras_first = false;       // lerobot: cameras that are there come first, missing ones last
  std::vector<StatePart> state_parts;
  std::vector<Transform> state_transforms;  // applied to the raw state before normalisation
  Normalization state_norm, action_norm;
  Prompt prompt;
  Actions actions;
};

}  // namespace servoflow::contract
