// The first stage: what the robot sees and is told becomes what the network takes.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "contract/contract.h"
#include "servoflow/observation.h"
#include "servoflow/status.h"
#include "stages/flow.h"
#include "stages/preprocess/image_decode.h"
#include "stages/preprocess/resize.h"
#include "stages/preprocess/tokenizer.h"

namespace servoflow::stages {

struct PreprocessOptions {
  int image_size = 224;        // side of the model's pictures, pixels
  std::string tokenizer_path;  // SentencePiece model; empty: only Observation::tokens are accepted
  std::shared_ptr<const Tokenizer> tokenizer;  // one that is open already, instead of the path
  int vocab = 257152;                          // rows of the model's token table
  int max_tokens = 200;        // the model's own limit; a contract that asks for more is refused
  bool raw_frames = false;     // the network letterboxes: frames go on as they are, where they fit
  std::string tokenizer_hint;  // told to whoever sends a prompt without a tokenizer: where one was looked for
};

// Not thread-safe: one per session, which keeps its buffers and its last prompt.
class Preprocessor {
 public:
  static Result<std::unique_ptr<Preprocessor>> create(const contract::Contract& contract,
                                                      const PreprocessOptions& options);

  // Images are found by request key or slot name; a camera that is not there is masked, its picture never
  // computed. The state goes through the contract's transforms, is normalised, and enters the prompt where
  // the contract says so. Errors name the field. After the first calls with the same sizes and prompt nothing
  // is allocated (but for decoding PNG and JPEG). On failure `out` is unspecified.
  Status run(const Observation& observation, ModelInput& out);

  const contract::Contract& contract() const { return contract_; }

 private:
  Preprocessor(const contract::Contract& contract, const PreprocessOptions& options);
  Status read_images(const Observation& observation, ModelInput& out);
  Status read_image(const ImageView& view, const contract::CameraSlot& camera, CameraPicture& picture);
  Status read_state(const Observation& observation, ModelInput& out) const;
  Status read_prompt(const Observation& observation, ModelInput& out);
  Status take_tokens(const Observation& observation, ModelInput& out) const;
  // Index of the camera that goes by this name; -1: none, -2: accepted and unused.
  int find_camera(std::string_view name) const;
  std::string known_images() const;

  contract::Contract contract_;
  PreprocessOptions options_;
  Letterbox letterbox_;
  std::shared_ptr<const Tokenizer> tokenizer_;  // null: token ids only
  int state_width_ = 0;

  std::vector<int> view_of_camera_;        // index into Observation::images, -1: missing
  std::vector<std::uint8_t> interleaved_;  // a channels-first frame, channels last
  Image decoded_;
  // The last prompt that was tokenised, and what came out.
  std::string last_prompt_;
  std::vector<int> bins_, last_bins_;
  std::vector<std::int32_t> last_tokens_;
  bool last_truncated_ = false, has_last_ = false;
};

}  // namespace servoflow::stages
