#include "contract/toml_robot.h"

#include <gtest/gtest.h>

#include <random>

#include "core/file.h"

namespace servoflow::contract {
namespace {

constexpr char kGood[] = R"(
name = "arm"
asset = "lab/arm"
[cameras]
right_wrist_0_rgb = { key = "wrist", required = false }
base_0_rgb = { key = "front" }
[state]
parts = [{ key = "joints", width = 6 }, { key = "gripper", width = 1 }]
transforms = [{ joint_flip = [1, -1] }]
[prompt]
key = "task"
state_in_prompt = false
default = "wait"
max_tokens = 48
[actions]
width = 7
names = ["x", "y", "z", "rx", "ry", "rz", "é"]
units = ["m", "m", "m", "rad", "rad", "rad", "1"]
transforms = [{ delta = [0, 1] }, { gripper = "aloha", dimensions = [6] }]
)";

std::string replaced(std::string text, const std::string& what, const std::string& with) {
  const std::size_t at = text.find(what);
  EXPECT_NE(at, std::string::npos) << what;
  return text.replace(at, what.size(), with);
}

TEST(RobotFile, ReadsEveryField) {
  const auto robot = parse_robot(kGood, "arm.toml");
  ASSERT_TRUE(robot.ok()) << robot.status().message();
  EXPECT_EQ(robot->name, "arm");
  EXPECT_EQ(robot->asset, "lab/arm");
  // The model's order, not the file's; what the file leaves out is masked.
  ASSERT_EQ(robot->cameras.size(), 3u);
  EXPECT_EQ(robot->cameras[0].slot, "base_0_rgb");
  EXPECT_EQ(robot->cameras[0].key, "front");
  EXPECT_TRUE(robot->cameras[0].required);
  EXPECT_EQ(robot->cameras[1].slot, "left_wrist_0_rgb");
  EXPECT_EQ(robot->cameras[1].key, "");
  EXPECT_FALSE(robot->cameras[1].required);
  EXPECT_EQ(robot->cameras[2].key, "wrist");
  EXPECT_FALSE(robot->cameras[2].required);
  ASSERT_EQ(robot->state_parts.size(), 2u);
  EXPECT_EQ(robot->state_parts[1].key, "gripper");
  EXPECT_EQ(robot->state_parts[1].width, 1);
  EXPECT_EQ(robot->state_transforms.size(), 1u);
  EXPECT_EQ(robot->prompt.key, "task");
  EXPECT_EQ(robot->prompt.mode, PromptMode::kPlain);
  EXPECT_EQ(robot->prompt.default_prompt, "wait");
  EXPECT_EQ(robot->prompt.max_tokens, 48);
  EXPECT_EQ(robot->actions.width, 7);
  ASSERT_EQ(robot->actions.transforms.size(), 2u);
  EXPECT_EQ(robot->actions.transforms[0].name, "delta");
  EXPECT_EQ(robot->actions.transforms[1].values, std::vector<double>{6});
  EXPECT_EQ(robot->actions.names, (std::vector<std::string>{"x", "y", "z", "rx", "ry", "rz", "é"}));
  EXPECT_EQ(robot->actions.units, (std::vector<std::string>{"m", "m", "m", "rad", "rad", "rad", "1"}));
}

TEST(RobotFile, BuiltInRobots) {
  EXPECT_EQ(list_builtin_robots(), (std::vector<std::string>{"aloha", "droid", "libero", "metaworld"}));
  for (const std::string& name : list_builtin_robots()) {
    const auto robot = load_robot(name);
    ASSERT_TRUE(robot.ok()) << robot.status().message();
    EXPECT_EQ(robot->name, name);
    EXPECT_TRUE(load_robot("robots/" + name + ".toml").ok());
  }
  EXPECT_EQ(load_robot("droid")->state_parts.size(), 2u);
  EXPECT_EQ(load_robot("libero")->actions.width, 7);
  EXPECT_EQ(load_robot("libero")->prompt.mode, PromptMode::kPlain);
  for (const std::string& name : list_builtin_robots()) {  // each labels all its columns
    const auto robot = load_robot(name);
    const auto width = static_cast<std::size_t>(robot->actions.width);
    EXPECT_EQ(robot->actions.names.size(), width) << name;
    EXPECT_EQ(robot->actions.units.size(), width) << name;
  }
  EXPECT_EQ(load_robot("aloha")->ignored_images, std::vector<std::string>{"images/cam_low"});
  const Status unknown = load_robot("pr2").status();
  EXPECT_NE(unknown.message().find("aloha, droid, libero, metaworld"), std::string::npos)
      << unknown.message();
  EXPECT_NE(load_robot("robots/none.toml").status().message().find("robots/none.toml"), std::string::npos);
}

// Each edit must be refused with a message that names the file and these words.
TEST(RobotFile, NamesWhatIsWrong) {
  struct Edit {
    const char *what, *with, *word;
  };
  for (const Edit& edit : std::vector<Edit>{
           {"name = \"arm\"", "name = \"arm\"\nnaem = 1", "naem"},
           {"name = \"arm\"", "name = \"arm\"\nname = \"arm\"", "line 3"},
           {"name = \"arm\"", "", "name: missing"},
           {"name = \"arm\"", "name = 5", "name: must be a string"},
           {"name = \"arm\"", "name = \"arm\"\nignored_images = [\"front\"]", "used twice"},
           {"base_0_rgb", "base_1_rgb",
            "cameras.base_1_rgb: unknown key; known here: base_0_rgb, left_wrist_0_rgb"},
           {"{ key = \"front\" }", "\"front\"", "cameras.base_0_rgb: must be an object"},
           {"{ key = \"front\" }", "{ key = \"front\", require = true }", "cameras.base_0_rgb.require"},
           {"{ key = \"front\" }", "{ key = \"front\", required = 1 }",
            "cameras.base_0_rgb.required: must be true or false"},
           {"{ key = \"front\" }", "{ required = true }", "cameras.base_0_rgb.key: missing"},
           {"{ key = \"front\" }", "{ key = \"\" }", "base_0_rgb"},
           {"{ key = \"front\" }", "{ key = \"wrist\" }", "\"wrist\" is used twice"},
           {"width = 6", "width = -6", "state.parts[0].width"},
           {"width = 6", "width = 6.5", "state.parts[0].width: must be an integer"},
           {"width = 6", "width = 99999999999", "state.parts[0].width"},
           {"width = 6", "width = 1979-05-27", "dates"},
           {"width = 6", "width = 6, height = 1", "state.parts[0].height"},
           {"key = \"gripper\"", "key = \"joints\"", "\"joints\" is used twice"},
           {"[1, -1]", "[1, nan]", "finite"},
           {"[1, -1]", "[1, 0]", "joint_flip"},
           {"[1, -1]", "[1, -1, 1, 1, 1, 1, 1, 1]", "joint_flip has 8 factors, the state has 7"},
           {"[1, -1]", "\"all\"", "state.transforms[0].joint_flip: must be an array"},
           {"joint_flip", "joint_flop", "names no transform"},
           {"{ joint_flip = [1, -1] }", "{ delta = [0] }", "not to the state"},
           {"state_in_prompt = false", "state_in_promt = false", "prompt.state_in_promt"},
           {"max_tokens = 48", "max_tokens = 0", "prompt.max_tokens"},
           {"default = \"wait\"", "default = 3", "prompt.default"},
           {"width = 7", "width = -7", "actions.width"},
           {"\"rz\", \"é\"]", "\"rz\"]", "actions.names: has 6 entries, the action has 7 columns"},
           {"\"rz\", \"é\"]", "\"rz\", \"x\"]", "actions.names[6]: the name \"x\" is used twice"},
           {"\"rz\", \"é\"]", "\"rz\", \"\"]", "actions.names[6]: empty"},
           {"\"rz\", \"é\"]", "\"rz\", 7]", "actions.names[6]: must be a string"},
           {"\"rz\", \"é\"]", "\"rz\", \"a\\nb\"]", "actions.names[6]: holds a control character"},
           {"[\"x\", \"y\", \"z\", \"rx\", \"ry\", \"rz\", \"é\"]", "[]", "actions.names: empty"},
           {"[\"x\", \"y\", \"z\", \"rx\", \"ry\", \"rz\", \"é\"]", "\"x\"",
            "actions.names: must be an array"},
           {"\"rad\", \"1\"]", "\"rad\"]", "actions.units: has 6 entries"},
           {"\"rad\", \"1\"]", "\"rad\", \"\"]", "actions.units[6]: empty; a plain number has the unit"},
           {"\"rad\", \"1\"]", "\"rad\", 1]", "actions.units[6]: must be a string"},
           {"width = 7", "width = 0", "actions.names: needs the width"},
           {"delta = [0, 1]", "delta = [0, 7]", "delta dimension 7 lies beyond the action"},
           {"delta = [0, 1]", "delta = [0, -1]", "whole numbers"},
           {"delta = [0, 1]", "delta = [0, 1], joint_flip = [1]", "more than one transform"},
           {"\"aloha\", dimensions = [6]", "\"shadow\", dimensions = [6]", "unknown gripper"},
           {"\"aloha\", dimensions = [6]", "\"aloha\"", "gripper dimension 13"},
           {"[actions]", "[actions", "not valid TOML"},
           {"[prompt]", "[prumpt]", "prumpt"},
       }) {
    const auto robot = parse_robot(replaced(kGood, edit.what, edit.with), "arm.toml");
    ASSERT_FALSE(robot.ok()) << edit.with;
    EXPECT_EQ(robot.status().code(), StatusCode::kInvalidInput);
    EXPECT_EQ(robot.status().message().rfind("arm.toml", 0), 0u) << robot.status().message();
    EXPECT_NE(robot.status().message().find(edit.word), std::string::npos)
        << edit.word << " is not in: " << robot.status().message();
  }
}

TEST(RobotFile, ListsAllProblemsAtOnce) {
  std::string text = replaced(kGood, "width = 6", "width = 0");
  text = replaced(text, "base_0_rgb", "base_9_rgb");
  text = replaced(text, "max_tokens = 48", "max_tokens = \"many\"");
  const std::string message = parse_robot(text, "arm.toml").status().message();
  for (const char* field : {"state.parts[0].width", "cameras.base_9_rgb", "prompt.max_tokens"}) {
    EXPECT_NE(message.find(std::string("arm.toml: ") + field), std::string::npos) << message;
  }
}

TEST(RobotFile, KeepsTextBeyondAscii) {
  const auto robot = parse_robot(
      replaced(kGood, "\"wait\"", "\"attends l\\\"\u00e9t\u00e9, \u5f85\U0001f916\" # \u00e9 \xff"), "text");
  ASSERT_TRUE(robot.ok()) << robot.status().message();
  EXPECT_EQ(robot->prompt.default_prompt, "attends l\"\u00e9t\u00e9, \u5f85\U0001f916");
}

TEST(RobotFile, OtherSlots) {
  const auto robot =
      parse_robot(replaced(replaced(kGood, "base_0_rgb", "\"cam.top\""), "right_wrist_0_rgb", "side"), "x",
                  {"side", "cam.top"});
  ASSERT_TRUE(robot.ok()) << robot.status().message();
  ASSERT_EQ(robot->cameras.size(), 2u);
  EXPECT_EQ(robot->cameras[0].slot, "side");
  EXPECT_EQ(robot->cameras[1].key, "front");
}

TEST(RobotFile, SurvivesHostileText) {
  const std::string good = kGood;
  for (std::size_t size = 0; size < good.size(); ++size)
    (void)parse_robot(std::string_view(good).substr(0, size), "cut");
  std::mt19937 random(11);
  for (int round = 0; round < 3000; ++round) {
    std::string text = good;
    for (int i = 0; i < 1 + round % 8; ++i) text[random() % text.size()] = static_cast<char>(random());
    const auto robot = parse_robot(text, "mutated");
    EXPECT_TRUE(robot.ok() || !robot.status().message().empty());
  }
  for (const char* text :
       {"[%x]", "[ = 1]", "base\u0420 = 1", "x = 1 \u00e9", "x = \"\"\"a\\\n\u00e9\"\"\"", "x = '''y'''"}) {
    EXPECT_FALSE(parse_robot(text, "parser").ok()) << text;
  }
  for (const char* text : {"6=6z6\"\xef\xbb\xb4", "x = \"\\\u00e9\"", "x = '\u00e9'", "x = \"\xed\xa0\x80\"",
                           "x = \"\xc0\xaf\"", "x = \"\xe2\x82\""}) {
    EXPECT_FALSE(parse_robot(text, "parser").ok()) << text;
  }
  EXPECT_FALSE(parse_robot(std::string(2 << 20, 'a'), "huge").ok());
  EXPECT_FALSE(parse_robot("x = " + std::string(100000, '['), "deep").ok());
  EXPECT_FALSE(parse_robot(std::string("name = \"a\0b\"", 12), "nul").ok());
  EXPECT_FALSE(parse_robot("name = \"\xff\"", "utf8").ok());
  std::string many = "name = \"x\"\n";
  for (int i = 0; i < 5000; ++i) many += "unknown" + std::to_string(i) + " = 1\n";
  const std::string message = parse_robot(many, "many").status().message();
  EXPECT_NE(message.find("more problems"), std::string::npos);
  EXPECT_LT(message.size(), 20000u);
}

}  // namespace
}  // namespace servoflow::contract
