#include "serve/request.h"

#include <gtest/gtest.h>

#include "serve/messages_for_tests.h"

namespace servoflow::serve {
namespace {

using namespace testing;  // NOLINT: Part, map, array, …

std::shared_ptr<const RequestSchema> schema(const std::string& robot) {
  PolicyInfo policy;
  policy.horizon = 2;
  policy.model_action_dim = 3;
  auto read = RequestSchema::from_contract(contract_json(robot), policy);
  EXPECT_TRUE(read.ok()) << read.status().message();
  return std::make_shared<RequestSchema>(*read);
}

Result<Request> decode(const Entries& entries, const std::string& robot = "libero") {
  return Request::decode(message(map(entries)), schema(robot), {});
}
std::string refusal(const Entries& entries, const std::string& robot = "libero") {
  const auto request = decode(entries, robot);
  return request.ok() ? "accepted" : request.status().message();
}

TEST(Request, LiberoAsTheStockClientSendsIt) {
  auto decoded = decode(libero());
  ASSERT_TRUE(decoded.ok()) << decoded.status().message();
  const Request request = *std::move(decoded);  // moved: nothing it points to may have moved
  const Observation& o = request.observation();
  ASSERT_EQ(o.images.size(), 2u);
  EXPECT_EQ(o.images[0].name, "observation/image");
  EXPECT_EQ(o.images[0].layout, ImageLayout::kHWC);
  EXPECT_EQ(o.images[0].height, 8);
  EXPECT_EQ(o.images[0].width, 10);
  EXPECT_EQ(o.images[0].bytes.size(), 240u);
  EXPECT_EQ(o.images[0].bytes[239], 7);
  EXPECT_EQ(std::vector<double>(o.state.begin(), o.state.end()),
            (std::vector<double>{1, 2, 3, 4, 5, 6, 7, 8}));
  EXPECT_EQ(*o.prompt, "open the drawer");
}

TEST(Request, DroidsGripperIsANumberAScalarOrAnArray) {
  const Entries base = {{"observation/exterior_image_1_left", image(4, 4)},
                        {"observation/wrist_image_left", image(4, 4)},
                        {"observation/joint_position", array_of<float>("<f4", {7}, {1, 2, 3, 4, 5, 6, 7})},
                        {"prompt", bytes("tidy up")}};
  for (const Part& gripper :
       {number(0.25), array_of<double>("<f8", {}, {0.25}), array_of<double>("<f8", {1}, {0.25}),
        list({number(0.25)}),
        map({{"__npgeneric__", boolean(true)}, {"data", number(0.25)}, {"dtype", text("<f4")}}, true)}) {
    const auto request = decode(with(base, "observation/gripper_position", gripper), "droid");
    ASSERT_TRUE(request.ok()) << request.status().message();
    EXPECT_EQ(request->observation().state.size(), 8u);
    EXPECT_EQ(request->observation().state[7], 0.25);
    EXPECT_EQ(*request->observation().prompt, "tidy up");
  }
  EXPECT_SAYS(refusal(base, "droid"), "observation/gripper_position: missing");
}

TEST(Request, AlohasCamerasAreNestedAndChannelsFirst) {
  const Part chw = array("|u1", {3, 6, 8}, std::string(144, 'x'));
  const Entries base = {{"state", array_of<double>("<f8", {14}, std::vector<double>(14, 0.1))},
                        {"images", map({{"cam_high", chw}, {"cam_low", chw}, {"cam_left_wrist", chw}})},
                        {"prompt", text("fold")}};
  const auto request = decode(base, "aloha");
  ASSERT_TRUE(request.ok()) << request.status().message();
  ASSERT_EQ(request->observation().images.size(), 2u);
  EXPECT_EQ(request->observation().images[1].name, "images/cam_left_wrist");
  EXPECT_EQ(request->observation().images[1].layout, ImageLayout::kCHW);
  EXPECT_EQ(request->observation().images[1].height, 6);
  EXPECT_EQ(refusal(with(base, "images", map({{"cam_high", chw}, {"cam_back", chw}})), "aloha"),
            "images: robot aloha has no camera \"cam_back\"");
  EXPECT_SAYS(refusal(with(base, "images", map({{"cam_low", chw}})), "aloha"), "images/cam_high: missing");
  EXPECT_SAYS(refusal(without(base, "prompt"), "aloha"), "prompt: missing");
}

TEST(Request, FloatImagesAreCutToBytesAsOpenpiDoes) {
  std::vector<float> pixels(12, 0.5f);
  pixels[0] = 1.0f;
  pixels[1] = 0.9999f;
  const auto request = decode(with(libero(), "observation/image", array_of<float>("<f4", {2, 2, 3}, pixels)));
  ASSERT_TRUE(request.ok()) << request.status().message();
  const auto& bytes = request->observation().images[0].bytes;
  EXPECT_EQ(bytes[0], 255);
  EXPECT_EQ(bytes[1], 254);
  EXPECT_EQ(bytes[2], 127);
  pixels[3] = 1.01f;
  EXPECT_SAYS(refusal(with(libero(), "observation/image", array_of<float>("<f4", {2, 2, 3}, pixels))),
              ("observation/image: value 1.01"));
  pixels[3] = NAN;
  EXPECT_SAYS(refusal(with(libero(), "observation/image", array_of<float>("<f4", {2, 2, 3}, pixels))),
              ("observation/image: value nan at element 3"));
}

TEST(Request, PictureFilesComeAsBytesOrAsAnArrayOfBytes) {
  const std::string jpeg("\xff\xd8\xff\xe0rest", 8);
  for (const Part& file : {bytes(jpeg), array("|u1", {8}, jpeg)}) {
    const auto request = decode(with(libero(), "observation/image", file));
    ASSERT_TRUE(request.ok()) << request.status().message();
    EXPECT_EQ(request->observation().images[0].layout, ImageLayout::kEncoded);
    EXPECT_EQ(request->observation().images[0].bytes.size(), 8u);
  }
  EXPECT_SAYS(refusal(with(libero(), "observation/image", bytes("GIF89a"))), "neither a PNG nor a JPEG");
}

TEST(Request, PromptsInEveryFormNumPyHas) {
  const std::u32string letters = U"öffne";
  const std::string utf32(reinterpret_cast<const char*>(letters.data()), letters.size() * 4);
  for (const Part& prompt : {text("öffne"), bytes("öffne"), array("<U5", {}, utf32),
                             array("<U7", {}, utf32 + std::string(8, '\0')), array("|S6", {1}, "öffne")}) {
    const auto request = decode(with(libero(), "prompt", prompt));
    ASSERT_TRUE(request.ok()) << request.status().message();
    EXPECT_EQ(*request->observation().prompt, "öffne");
  }
  EXPECT_EQ(refusal(with(libero(), "prompt", bytes("\xff"))), "prompt: not valid UTF-8");
  EXPECT_SAYS(refusal(with(libero(), "prompt", array("<U1", {}, std::string("\0\xd8\0\0", 4)))),
              "prompt: holds no valid text");
  EXPECT_SAYS(refusal(with(libero(), "prompt", whole(3))), "prompt: is a whole number");
  EXPECT_SAYS(refusal(without(libero(), "prompt")), "prompt: missing");
}

TEST(Request, RefusalsNameTheField) {
  const auto state = [](const Part& value) { return refusal(with(libero(), "observation/state", value)); };
  EXPECT_EQ(refusal(without(libero(), "observation/wrist_image")),
            "observation/wrist_image: missing; robot libero needs this camera");
  EXPECT_SAYS(refusal(without(libero(), "observation/state")), "observation/state: missing");
  EXPECT_EQ(state(array_of<double>("<f8", {7}, std::vector<double>(7))),
            "observation/state: shape [7]; robot libero needs [8]");
  EXPECT_SAYS(state(array_of<double>("<f8", {0}, {})), "observation/state: shape [0]");
  EXPECT_SAYS(state(array_of<double>("<f8", {1, 8}, std::vector<double>(8))),
              "observation/state: shape [1, 8]");
  EXPECT_SAYS(state(array("<U1", {8}, std::string(32, '\0'))), "observation/state: dtype \"<U1\"");
  EXPECT_SAYS(state(array_of<double>("<f8", {8}, {1, 2, INFINITY, 4, 5, 6, 7, 8})),
              ("observation/state: element 2 is not a finite number"));
  EXPECT_SAYS(state(nil()), "observation/state: is nil");
  EXPECT_SAYS(state(list({list({number(1)}), list({number(1), number(2)})})), "not equally long");
  EXPECT_SAYS(refusal(with(libero(), "observation/image", image(0, 10))),
              "observation/image: shape [0, 10, 3]");
  EXPECT_SAYS(refusal(with(libero(), "observation/image", array("|u1", {8, 8}, std::string(64, 'x')))),
              ("observation/image: shape [8, 8]"));
  EXPECT_SAYS(refusal(with(libero(), "observation/image", array("<i8", {1, 1, 3}, std::string(24, 'x')))),
              ("observation/image: dtype \"<i8\""));
  EXPECT_SAYS(refusal(with(libero(), "observation/image", text("cat"))), "observation/image: is a string");
}

TEST(Request, OptionalKeys) {
  std::vector<float> noise = {0, 1, 2, 3, 4, 5};
  Entries entries = libero();
  for (const auto& [key, value] : Entries{{"noise", array_of<float>("<f4", {2, 3}, noise)},
                                          {"seed", whole(7)},
                                          {"num_steps", whole(4)},
                                          {"reset", boolean(true)},
                                          {"episode_id", text("kitchen/3")},
                                          {"deadline_ms", number(50)},
                                          {"unknown", map({{"anything", nil()}})}})
    entries = with(entries, key, value);
  const auto request = decode(entries);
  ASSERT_TRUE(request.ok()) << request.status().message();
  const RequestOptions& o = request->options();
  EXPECT_EQ(o.noise, noise);
  EXPECT_EQ(o.seed, 7u);
  EXPECT_EQ(o.steps, 4);
  EXPECT_TRUE(o.reset);
  EXPECT_EQ(o.episode, "kitchen/3");
  EXPECT_EQ(o.deadline_ms, 50);

  const auto none = decode(with(with(libero(), "noise", nil()), "seed", nil()));
  ASSERT_TRUE(none.ok()) << none.status().message();
  EXPECT_TRUE(none->options().noise.empty());
  EXPECT_FALSE(none->options().seed.has_value());

  const auto bad = [](const char* key, const Part& value) { return refusal(with(libero(), key, value)); };
  EXPECT_EQ(bad("noise", array_of<float>("<f4", {3, 2}, noise)),
            "noise: shape [3, 2]; this policy needs [2, 3]");
  EXPECT_SAYS(bad("noise", array_of<float>("<f4", {2}, {1, 2})), "noise: shape [2]");
  noise[2] = NAN;
  EXPECT_SAYS(bad("noise", array_of<float>("<f4", {2, 3}, noise)), "noise: element 2");
  EXPECT_SAYS(bad("seed", whole(-1)), "seed:");
  EXPECT_SAYS(bad("seed", number(0.5)), "seed:");
  EXPECT_SAYS(bad("num_steps", whole(0)), "num_steps: expected a whole number of 1 to 50");
  EXPECT_SAYS(bad("num_steps", whole(51)), "num_steps:");
  EXPECT_SAYS(bad("reset", whole(1)), "reset: is a whole number");
  EXPECT_SAYS(bad("episode_id", list({})), "episode_id:");
  EXPECT_SAYS(bad("deadline_ms", number(0)), "deadline_ms:");
  EXPECT_SAYS(bad("deadline_ms", number(NAN)), "deadline_ms:");
}

TEST(Request, ASchemaThatIsNoContractIsAnError) {
  EXPECT_FALSE(RequestSchema::from_contract("{}", {}).ok());
  EXPECT_FALSE(RequestSchema::from_contract("nonsense", {}).ok());
}

}  // namespace
}  // namespace servoflow::serve
