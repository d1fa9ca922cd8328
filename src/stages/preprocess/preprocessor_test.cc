#include "stages/preprocess/preprocessor.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <filesystem>
#include <limits>
#include <map>

#include "contract/load.h"
#include "core/safetensors.h"

namespace servoflow::stages {
namespace {

using contract::Contract;

constexpr char kTokenizer[] = "tests/golden/tokenizer/tokenizer.model";
const PreprocessOptions kOptions{
    .image_size = 224, .tokenizer_path = kTokenizer, .vocab = 1024, .max_tokens = 200, .tokenizer_hint = ""};

Contract load(const std::string& directory, const std::string& robot) {
  auto contract =
      contract::load_contract(directory, {.robot = robot, .assets = "", .lerobot_layout = robot.empty()});
  EXPECT_TRUE(contract.ok()) << contract.status().message();
  return std::move(*contract);
}
Contract libero() { return load("tests/golden/openpi-tiny", "libero"); }
Contract lerobot() { return load("tests/golden/lerobot-tiny", ""); }

std::unique_ptr<Preprocessor> make(const Contract& contract, const PreprocessOptions& options = kOptions) {
  auto made = Preprocessor::create(contract, options);
  EXPECT_TRUE(made.ok()) << made.status().message();
  return std::move(*made);
}

std::vector<std::string> words(const std::string& text) {
  std::vector<std::string> out;
  for (std::size_t i = 0; i < text.size();) {
    const std::size_t end = std::min(text.find(' ', i), text.size());
    out.push_back(text.substr(i, end - i));
    i = end + 1;
  }
  return out;
}

// Recorded cases: frames, state and prompt go in; pictures, state and tokens must come out as recorded.
void check_case(const SafetensorsFile& file, Preprocessor& preprocessor, double image_tolerance) {
  const auto& meta = file.metadata();
  Observation observation;
  const auto state = to_doubles(*file.find("input/state"));
  ASSERT_TRUE(state.ok());
  observation.state = *state;
  observation.prompt = meta.at("prompt");
  for (const std::string& slot : words(meta.at("slots"))) {
    const SafeTensor* frame = file.find("input/image/" + slot);
    ASSERT_NE(frame, nullptr) << slot;
    const auto* bytes = reinterpret_cast<const std::uint8_t*>(frame->bytes.data());
    observation.images.push_back({std::string_view(frame->name).substr(std::string("input/image/").size()),
                                  ImageLayout::kHWC,
                                  static_cast<int>(frame->shape[0]),
                                  static_cast<int>(frame->shape[1]),
                                  {bytes, frame->bytes.size()}});
  }
  // Whatever order the request lists them in.
  std::reverse(observation.images.begin(), observation.images.end());
  ModelInput out;
  const Status status = preprocessor.run(observation, out);
  ASSERT_TRUE(status.ok()) << status.message();

  const auto expected_state = to_doubles(*file.find("expect/state_normalized"));
  ASSERT_TRUE(expected_state.ok());
  ASSERT_EQ(out.state_normalized.size(), expected_state->size());
  for (std::size_t i = 0; i < expected_state->size(); ++i) {
    EXPECT_EQ(out.state_normalized[i], (*expected_state)[i])
        << "state " << i;  // the same operations, the same bits
  }
  const auto padded = to_doubles(*file.find("expect/tokens")),
             mask = to_doubles(*file.find("expect/token_mask"));
  ASSERT_TRUE(padded.ok() && mask.ok());
  std::vector<std::int32_t> tokens;
  for (std::size_t i = 0; i < padded->size(); ++i) {
    if ((*mask)[i] != 0) tokens.push_back(static_cast<std::int32_t>((*padded)[i]));
  }
  EXPECT_EQ(out.tokens, tokens);
  const auto order = words(meta.count("camera_order") ? meta.at("camera_order") : meta.at("slots"));
  ASSERT_EQ(out.picture_count, static_cast<int>(words(meta.at("slots")).size()));
  for (int p = 0; p < out.picture_count; ++p) {
    const std::string& slot = preprocessor.contract().cameras[out.pictures[p].slot].slot;
    EXPECT_EQ(slot, order[p]);
    const SafeTensor* image = file.find("expect/image/" + slot);
    if (image == nullptr) continue;
    const auto want = to_floats(*image);
    ASSERT_TRUE(want.ok());
    ASSERT_EQ(want->size(), out.pictures[p].pixels.size());
    double worst = 0;
    for (std::size_t i = 0; i < want->size(); ++i)
      worst = std::max<double>(worst, std::abs((*want)[i] - out.pictures[p].pixels[i]));
    EXPECT_LE(worst, image_tolerance) << slot;
  }
}

TEST(Preprocessor, OpenpiCases) {
  int cases = 0;
  for (const auto& entry : std::filesystem::directory_iterator("tests/golden/openpi-tiny/cases")) {
    SCOPED_TRACE(entry.path().string());
    const auto file = SafetensorsFile::open(entry.path().string());
    ASSERT_TRUE(file.ok()) << file.status().message();
    // Frames go straight to the slots, and the case says how its prompt is made.
    Contract contract = libero();
    for (auto& camera : contract.cameras) camera = {camera.slot, camera.slot, false};
    contract.prompt.mode = file->metadata().at("prompt_mode") == "state" ? contract::PromptMode::kState
                                                                         : contract::PromptMode::kPlain;
    const auto preprocessor = make(contract);
    check_case(*file, *preprocessor, 1e-6);
    check_case(*file, *preprocessor, 1e-6);  // from the kept prompt
    ++cases;
  }
  EXPECT_EQ(cases, 10);
}

TEST(Preprocessor, LerobotCases) {
  int cases = 0;
  for (const char* folder : {"tests/golden/lerobot-tiny", "tests/golden/lerobot-tiny-meanstd"}) {
    const auto preprocessor = make(load(folder, ""));
    for (const auto& entry : std::filesystem::directory_iterator(std::string(folder) + "/cases")) {
      SCOPED_TRACE(entry.path().string());
      const auto file = SafetensorsFile::open(entry.path().string());
      ASSERT_TRUE(file.ok()) << file.status().message();
      check_case(*file, *preprocessor, 1e-4);
      ++cases;
    }
  }
  EXPECT_EQ(cases, 6);
}

struct Frame {
  int height = 0, width = 0;
  std::vector<std::uint8_t> hwc, chw;
  Frame(int h, int w) : height(h), width(w), hwc(3 * h * w), chw(3 * h * w) {
    for (int i = 0; i < h * w; ++i) {
      for (int c = 0; c < 3; ++c)
        hwc[3 * i + c] = chw[c * h * w + i] = static_cast<std::uint8_t>(i * 7 + c * 50);
    }
  }
  ImageView view(std::string_view name, ImageLayout layout = ImageLayout::kHWC) const {
    return {name, layout, height, width, layout == ImageLayout::kCHW ? chw : hwc};
  }
};

const Frame& frame() {
  static const Frame kFrame(120, 160);
  return kFrame;
}
const std::vector<double> kState{0.1, -1.1406, 0.3, 0.0, 0.5, -0.4, 0.0, -0.2};

Observation observation() {
  Observation o;
  o.images = {frame().view("observation/image"), frame().view("observation/wrist_image")};
  o.state = kState;
  o.prompt = "open the top drawer";
  return o;
}

// The error's text for an observation of robot libero, which must be refused.
std::string refusal(const Observation& o, const Contract& contract = libero(),
                    const PreprocessOptions& options = kOptions) {
  ModelInput out;
  const Status status = make(contract, options)->run(o, out);
  EXPECT_EQ(status.code(), StatusCode::kInvalidInput);
  return status.message();
}
void expect_in(const std::string& text, const std::vector<std::string>& parts) {
  for (const std::string& part : parts)
    EXPECT_NE(text.find(part), std::string::npos) << '"' << part << "\" is not in: " << text;
}

TEST(Preprocessor, LayoutsAndNamesAgree) {
  const auto preprocessor = make(libero());
  ModelInput by_key, by_slot;
  ASSERT_TRUE(preprocessor->run(observation(), by_key).ok());
  Observation o = observation();
  o.images = {frame().view("left_wrist_0_rgb", ImageLayout::kCHW), frame().view("base_0_rgb")};
  ASSERT_TRUE(preprocessor->run(o, by_slot).ok());
  ASSERT_EQ(by_key.picture_count, 2);
  for (int p = 0; p < 2; ++p) {
    EXPECT_EQ(by_key.pictures[p].slot, p);
    EXPECT_EQ(by_key.pictures[p].pixels, by_slot.pictures[p].pixels);
  }
  EXPECT_EQ(by_key.state, kState);
}

TEST(Preprocessor, ModelSizeIsAParameter) {
  Contract contract = libero();
  contract.prompt.max_tokens = 32;
  PreprocessOptions options = kOptions;
  options.image_size = 128;
  options.max_tokens = 32;
  ModelInput out;
  ASSERT_TRUE(make(contract, options)->run(observation(), out).ok());
  EXPECT_EQ(out.pictures[0].pixels.size(), 3u * 128 * 128);
  options.max_tokens = 31;
  const auto refused = Preprocessor::create(contract, options);
  ASSERT_FALSE(refused.ok());
  expect_in(refused.status().message(), {"prompt.max_tokens", "32", "31"});
}

TEST(Preprocessor, RefusesImagesByName) {
  Observation o = observation();
  o.images.pop_back();
  expect_in(refusal(o), {"observation/wrist_image", "missing"});
  o = observation();
  o.images.push_back(frame().view("observation/third_image"));
  expect_in(refusal(o), {"observation/third_image", "observation/wrist_image"});
  o.images.back().name = "right_wrist_0_rgb";  // a slot that libero masks
  expect_in(refusal(o), {"right_wrist_0_rgb"});
  o.images.back().name = "base_0_rgb";
  expect_in(refusal(o), {"base_0_rgb", "twice"});
  o = observation();
  o.images[1].height -= 1;
  expect_in(refusal(o), {"observation/wrist_image", "bytes"});
  o.images[1] = frame().view("observation/wrist_image", ImageLayout::kCHW);
  o.images[1].width = 1 << 30;
  expect_in(refusal(o), {"observation/wrist_image"});
  o.images[1] = frame().view("observation/wrist_image", ImageLayout::kEncoded);
  expect_in(refusal(o), {"observation/wrist_image", "PNG"});
  const Frame narrow(700, 3);
  o.images[1] = narrow.view("observation/wrist_image");
  expect_in(refusal(o), {"observation/wrist_image", "3x700"});
  o.images.clear();
  expect_in(refusal(o, lerobot()), {"none given", "observation.images.top"});
}

TEST(Preprocessor, RefusesStates) {
  Observation o = observation();
  o.state = std::span(kState).first(7);
  expect_in(refusal(o), {"observation/state", "needs 8 numbers, got 7"});
  o.state = {};
  expect_in(refusal(o), {"got 0"});
  for (const double bad :
       {std::numeric_limits<double>::quiet_NaN(), std::numeric_limits<double>::infinity()}) {
    std::vector<double> state = kState;
    state[3] = bad;
    o.state = state;
    expect_in(refusal(o), {"observation/state[3]", "finite"});
  }
  std::vector<double> far = kState;
  far[1] = 1e305;  // overflows when divided by this dimension's tiny range
  o.state = far;
  expect_in(refusal(o), {"observation/state[1]", "statistics"});
  Contract droid = load("tests/golden/openpi-tiny", "droid");
  far = kState;
  far[7] = NAN;
  o.state = far;
  o.images = {frame().view("base_0_rgb"), frame().view("left_wrist_0_rgb")};
  expect_in(refusal(o, droid), {"observation/gripper_position[0]"});
}

TEST(Preprocessor, RefusesPromptsAndTokens) {
  Observation o = observation();
  o.prompt.reset();
  expect_in(refusal(o), {"prompt", "missing"});
  o.prompt = "caf\xe9";
  expect_in(refusal(o), {"prompt", "UTF-8"});
  const std::string huge(2 << 20, 'a');
  o.prompt = huge;
  expect_in(refusal(o), {"prompt", "bytes"});
  const std::vector<std::int32_t> tokens{2, 5, 1023}, over{2, 1024}, negative{-1}, many(201, 5);
  o.prompt = "both";
  o.tokens = tokens;
  expect_in(refusal(o), {"tokens", "prompt"});
  o.prompt.reset();
  o.tokens = over;
  expect_in(refusal(o), {"tokens[1]", "1024"});
  o.tokens = negative;
  expect_in(refusal(o), {"tokens[0]", "-1"});
  o.tokens = many;
  expect_in(refusal(o), {"tokens", "201", "200"});

  PreprocessOptions none = kOptions;
  none.tokenizer_path.clear();
  none.tokenizer_hint = "looked for it everywhere";
  o.tokens = tokens;
  ModelInput out;
  ASSERT_TRUE(make(libero(), none)->run(o, out).ok());
  EXPECT_EQ(out.tokens, tokens);
  expect_in(refusal(observation(), libero(), none),
            {"paligemma_tokenizer.model", "big_vision", "--tokenizer", "looked for it everywhere"});
  none.tokenizer_path = "README.md";
  EXPECT_FALSE(Preprocessor::create(libero(), none).ok());
}

TEST(Preprocessor, DefaultPromptAndTruncation) {
  Contract contract = libero();
  contract.prompt.default_prompt = "open the top drawer";
  const auto preprocessor = make(contract);
  ModelInput given, defaulted;
  Observation o = observation();
  ASSERT_TRUE(preprocessor->run(o, given).ok());
  o.prompt.reset();
  ASSERT_TRUE(preprocessor->run(o, defaulted).ok());
  EXPECT_EQ(given.tokens, defaulted.tokens);
  EXPECT_FALSE(given.prompt_truncated);
  std::string longer;
  for (int i = 0; i < 300; ++i) longer += "drawer ";
  o.prompt = longer;
  ASSERT_TRUE(preprocessor->run(o, given).ok());
  EXPECT_TRUE(given.prompt_truncated);
  EXPECT_EQ(given.tokens.size(), 200u);
  o.prompt = "";  // an empty prompt is a prompt
  ASSERT_TRUE(preprocessor->run(o, given).ok());
  EXPECT_EQ(given.tokens.size(), 2u);
}

TEST(Preprocessor, ARefusedPromptIsNotRemembered) {
  const auto preprocessor = make(libero());
  ModelInput first, second;
  ASSERT_TRUE(preprocessor->run(observation(), first).ok());
  Observation bad = observation();
  bad.prompt = "\xff";
  EXPECT_FALSE(preprocessor->run(bad, second).ok());
  EXPECT_FALSE(preprocessor->run(bad, second).ok());
  ASSERT_TRUE(preprocessor->run(observation(), second).ok());
  EXPECT_EQ(first.tokens, second.tokens);
}

TEST(Preprocessor, AlohaIgnoresTheLowCamera) {
  Contract aloha = load("tests/golden/openpi-tiny", "libero");
  aloha.ignored_images = {"images/cam_low"};
  Observation o = observation();
  o.images.push_back(frame().view("images/cam_low"));
  ModelInput out;
  ASSERT_TRUE(make(aloha)->run(o, out).ok());
  EXPECT_EQ(out.picture_count, 2);
}

}  // namespace
}  // namespace servoflow::stages
