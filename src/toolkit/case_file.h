// A recorded case: inputs of one inference, what a reference computed at every stage, and how close is close
// enough.
//
// The format is described in tests/golden/README.md ("A case file"). Version 2 carries how to run and judge
// itself; version 1 leaves that out, and its entry, prompt mode, widths and tolerances follow from the layout
// it was made with. A case is read strictly: an unknown tensor, a step or slot the metadata rules out, or a
// gate nobody knows is an error.
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "contract/contract.h"
#include "core/safetensors.h"
#include "core/shape.h"
#include "servoflow/status.h"

namespace servoflow::toolkit {

// What a stage must hold to pass. Shares are of the root mean square of the expected tensor.
struct Gates {
  std::optional<double> max;     // largest |difference| / rms
  std::optional<double> rms;     // rms of the difference / rms
  std::optional<double> cosine;  // smallest allowed
};

using ToleranceTable = std::map<std::string, Gates>;  // by stage group: "vision", "k", "velocity", …

// What a stage's name says: "step3/v" is the velocity of step 3.
struct StageName {
  std::string name;   // after "expect/"
  std::string group;  // its key in the tolerances; "tokens" and "token_mask" are exact and in no table
  std::string slot;   // of image/<slot> and vision/<slot>
  int index = -1;     // of layers, times and steps
  bool exact = false;
};

// Nothing for a name no recorder writes.
std::optional<StageName> parse_stage_name(const std::string& name);

// Where in the pipeline a group's stages arise: state and tokens first, actions last. Groups of one layer or
// step share it.
int pipeline_rank(const std::string& group);

struct ExpectedStage {
  StageName stage;
  const SafeTensor* tensor = nullptr;
};

struct CaseImage {
  std::string slot;
  int height = 0, width = 0;
  std::span<const std::uint8_t> rgb;  // [height, width, 3], inside the case's mapping
};

enum class CaseEntry {
  kFrames,  // raw frames, state and prompt
  kTokens,  // pictures at model size, and token ids
};

enum class CasePrompt { kState, kPlain, kNone };

struct CaseFile {
  CaseFile() = default;
  CaseFile(CaseFile&&) = default;  // only moved: `expected` points into `file`
  CaseFile& operator=(CaseFile&&) = default;

  std::string name;  // the file's name without ".safetensors"
  std::string about, format, robot;
  CaseEntry entry = CaseEntry::kFrames;
  CasePrompt prompt_mode = CasePrompt::kNone;
  std::string prompt;
  int steps = 0, max_tokens = 0;
  std::optional<int>
      action_width;  // absent: normalised actions only (or, in version 1, what the checkpoint says)
  // The robot's contract when the case was recorded. An openpi checkpoint takes state parts and transforms
  // from it, never its statistics; other layouts take all of it. Absent: what the checkpoint says; openpi's
  // then has the state as one part and no transforms.
  std::optional<contract::Contract> contract;
  std::vector<std::string> slots;  // cameras that are present, in the order the model sees them
  std::vector<CaseImage> images;   // in the order of `slots`
  std::vector<double> state;
  std::vector<float> noise;  // [horizon, action_dim]
  int horizon = 0, action_dim = 0;
  std::vector<std::int32_t> tokens;  // valid ones of expect/tokens
  std::vector<ExpectedStage> expected;
  std::map<std::string, ToleranceTable> tolerances;  // by precision: "fp32", "bf16"
  std::vector<std::string> notes;                    // what was read but is not judged
  SafetensorsFile file;                              // keeps the tensors' bytes alive
};

Result<CaseFile> read_case(const std::string& path);
// The same from a file that is open already; `path` gives the case's name.
Result<CaseFile> case_from_file(SafetensorsFile file, const std::string& path);
// Every *.safetensors in `directory`, by name. All problems of all files are in one error.
Result<std::vector<CaseFile>> read_cases(const std::string& directory);

}  // namespace servoflow::toolkit
